from __future__ import annotations

from functools import partial

import pytest
import torch

from kdrun.losses import distributions as d

STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
LOG_Q, LOG_P = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)

BY_HAND = {
    "forward_kl": (d.forward_kl, 0.219552),
    "reverse_kl": (d.reverse_kl, 0.189798),
    "jsd 0.1": (partial(d.jensen_shannon, beta=0.1), 0.019070),
    "jsd 0.5": (partial(d.jensen_shannon, beta=0.5), 0.048771),
    "jsd 0.9": (partial(d.jensen_shannon, beta=0.9), 0.017086),
    "tvd": (d.total_variation, 0.251444),
    "skew_forward_kl": (partial(d.skew_forward_kl, skew=0.1), 0.166246),
    "skew_reverse_kl": (partial(d.skew_reverse_kl, skew=0.1), 0.154005),
    "adaptive_kl": (partial(d.adaptive_kl, head_mass=0.5), 0.205126),
    "alpha_beta .2 .7": (partial(d.alpha_beta, alpha=0.2, beta=0.7), 0.219159),
    "alpha_beta .5 .5": (partial(d.alpha_beta, alpha=0.5, beta=0.5), 0.199692),
    "alpha_beta 1 0": (partial(d.alpha_beta, alpha=1.0, beta=0.0), 0.219552),
    "alpha_beta 0 1": (partial(d.alpha_beta, alpha=0.0, beta=1.0), 0.189798),
}
EVERY = [function for function, _ in BY_HAND.values()]
EVERY += [
    partial(d.symmetric_kl, share=0.9),
    partial(d.alpha_beta, alpha=0.0, beta=0.0),
    partial(d.alpha_beta, alpha=0.5, beta=-0.5),
]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


@pytest.mark.parametrize(("function", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(function, expected: float) -> None:
    assert function(LOG_Q, LOG_P).mean().item() == pytest.approx(expected, abs=1e-6)


def test_rows_by_hand() -> None:
    expected = torch.tensor([0.061554, 0.377550], dtype=torch.float64)
    torch.testing.assert_close(d.forward_kl(LOG_Q, LOG_P), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([0.076667, 0.302929], dtype=torch.float64)
    torch.testing.assert_close(d.reverse_kl(LOG_Q, LOG_P), expected, atol=1e-6, rtol=0)


def test_head_weights_of_adaptive_kl_by_hand() -> None:
    value = d.adaptive_kl(LOG_Q, LOG_P, head_mass=0.5)
    forward, reverse = d.forward_kl(LOG_Q, LOG_P), d.reverse_kl(LOG_Q, LOG_P)
    weights = torch.tensor([0.440398, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        value, weights * forward + (1 - weights) * reverse, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("function", EVERY)
def test_agreement_costs_nothing_and_disagreement_does(function) -> None:
    log_q, log_p = pair()
    assert function(log_p, log_p).abs().max() < 1e-12
    assert (function(log_q, log_p) > 0).all()


@pytest.mark.parametrize("function", EVERY)
def test_gradient_by_finite_differences(function) -> None:
    log_q, log_p = pair()
    logits = log_q.clone().requires_grad_()
    if isinstance(function, partial) and function.func is d.adaptive_kl:
        # Its weights are constants by definition, so only the two divergences are differentiated.
        with torch.no_grad():
            forward, reverse = d.forward_kl(log_q, log_p), d.reverse_kl(log_q, log_p)
            weight = (function(log_q, log_p) - reverse) / (forward - reverse)
        gradient = torch.autograd.grad(function(logits.log_softmax(-1), log_p).sum(), logits)[0]
        log = logits.log_softmax(-1)
        fixed = weight * d.forward_kl(log, log_p) + (1 - weight) * d.reverse_kl(log, log_p)
        torch.testing.assert_close(gradient, torch.autograd.grad(fixed.sum(), logits)[0])
        return
    assert torch.autograd.gradcheck(lambda z: function(z.log_softmax(-1), log_p), logits)


def test_gradients_of_both_kl_in_closed_form() -> None:
    log_q, log_p = pair()
    logits = log_q.clone().requires_grad_()
    p, q = log_p.exp(), log_q.exp()
    (gradient,) = torch.autograd.grad(d.forward_kl(logits.log_softmax(-1), log_p).sum(), logits)
    torch.testing.assert_close(gradient, q - p)
    (gradient,) = torch.autograd.grad(d.reverse_kl(logits.log_softmax(-1), log_p).sum(), logits)
    value = d.reverse_kl(log_q, log_p)
    torch.testing.assert_close(gradient, q * (log_q - log_p - value[:, None]))


def test_identities() -> None:
    log_q, log_p = pair()
    same = torch.testing.assert_close
    same(d.jensen_shannon(log_q, log_p, beta=0.0), d.forward_kl(log_q, log_p))
    same(d.jensen_shannon(log_q, log_p, beta=1.0), d.reverse_kl(log_q, log_p))
    swapped = d.jensen_shannon(log_p, log_q, beta=0.7)
    same(d.jensen_shannon(log_q, log_p, beta=0.3), swapped)
    same(d.total_variation(log_q, log_p), d.total_variation(log_p, log_q))
    assert d.total_variation(log_q, log_p).max() <= 1
    same(d.skew_forward_kl(log_q, log_p, skew=0.0), d.forward_kl(log_q, log_p))
    same(d.skew_reverse_kl(log_q, log_p, skew=0.0), d.reverse_kl(log_q, log_p))
    for skewed in (d.skew_forward_kl, d.skew_reverse_kl):
        assert skewed(log_q, log_p, skew=1.0).abs().max() < 1e-12


@pytest.mark.parametrize("limit", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5), (0.5, -0.5)])
def test_alpha_beta_is_continuous_at_its_limits(limit: tuple[float, float]) -> None:
    log_q, log_p = pair()
    alpha, beta = limit
    near = d.alpha_beta(log_q, log_p, alpha=alpha + 1e-6, beta=beta + 1e-6)
    at = d.alpha_beta(log_q, log_p, alpha=alpha, beta=beta)
    torch.testing.assert_close(near, at, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [d.forward_kl, d.reverse_kl, BY_HAND["jsd 0.5"][0]])
def test_banned_classes_have_no_say(function) -> None:
    bans = torch.tensor([0.0, 0.0, float("-inf")], dtype=torch.float64)
    logits = STUDENT.clone().requires_grad_()
    value = function((logits + bans).log_softmax(-1), (TEACHER + bans).log_softmax(-1))
    expected = function(STUDENT[:, :2].log_softmax(-1), TEACHER[:, :2].log_softmax(-1))
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert logits.grad.isfinite().all()
