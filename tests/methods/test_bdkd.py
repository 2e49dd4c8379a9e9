from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kdrun.losses.divergence import entropy
from kdrun.methods.bdkd import BDKD, divergence_weights, weighted_divergences
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import ConvNet, train

NOW = Progress(0, 1, 0, 1)
STUDENT = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 1])


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch_of(target: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(target), 1), target, torch.arange(len(target)))


def terms_of(method: BDKD, student, teacher, target=TARGET, **others) -> dict[str, torch.Tensor]:
    outputs = {"teacher": ModelOutput(teacher)}
    outputs |= {role: ModelOutput(logits) for role, logits in others.items()}
    terms = method.losses(ModelOutput(student), outputs, batch_of(target), NOW)
    assert set(method.weights(NOW)) <= set(terms)
    return terms


def divergences(student, teacher, *, forward=1.0, reverse=1.0, temperature=1.0) -> dict:
    ones = torch.ones_like(student[..., 0])
    return weighted_divergences(
        student, teacher, forward * ones, reverse * ones, temperature=temperature, t_squared=True
    )


def weights_of(divergence: str, student=STUDENT, teacher=TEACHER, **options):
    defaults = {"temperature": 1.0, "high": 2.0, "low": 1.0, "slope": 1.0}
    return divergence_weights(student, teacher, divergence=divergence, **defaults | options)


# -- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "forward", "reverse"), [(0, 0.123292, 0.119630), (1, 0.614065, 0.869599)]
)
def test_both_divergences(sample: int, forward: float, reverse: float) -> None:
    rows = slice(sample, sample + 1)
    found = divergences(STUDENT[rows], TEACHER[rows])
    assert found["forward"].item() == pytest.approx(forward, abs=1e-6)
    assert found["reverse"].item() == pytest.approx(reverse, abs=1e-6)


def test_entropies() -> None:
    torch.testing.assert_close(
        entropy(STUDENT), torch.tensor([0.832396, 1.074368]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        entropy(TEACHER), torch.tensor([1.017357, 0.366594]).double(), atol=1e-6, rtol=0
    )


def test_the_balanced_terms() -> None:
    forward, reverse = weights_of("balanced")
    assert forward.tolist() == [2, 1], "the first student is more confident than its teacher"
    assert reverse.tolist() == [1, 2]
    terms = terms_of(BDKD(), STUDENT, TEACHER)
    assert (terms["forward"] + terms["reverse"]).item() == pytest.approx(1.359739, abs=1e-6)
    assert terms["mutual_teacher"].item() == pytest.approx(0.494615, abs=1e-6)
    for name, logits in (("supervised", STUDENT), ("supervised_teacher", TEACHER)):
        expected = nn.functional.cross_entropy(logits.float(), TARGET).item()
        assert terms[name].item() == pytest.approx(expected)


def test_gradient_of_the_reverse_divergence() -> None:
    student = STUDENT[:1].clone().requires_grad_()
    divergences(student, TEACHER[:1])["reverse"].backward()
    expected = torch.tensor([[0.222695, -0.162803, -0.059892]], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=0)
    log_q, log_p = STUDENT[:1].log_softmax(1), TEACHER[:1].log_softmax(1)
    closed = log_q.exp() * (log_q - log_p - 0.119630)
    torch.testing.assert_close(student.grad, closed, atol=1e-6, rtol=0)


# -- properties ------------------------------------------------------------------------------------


def test_the_naive_loop() -> None:
    student, teacher = random_logits(2, 6, 5).unbind()
    temperature, expected = 3.0, 0.0
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        q, p = s.softmax(0).tolist(), t.softmax(0).tolist()
        forward = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        reverse = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
        h_s = -sum(a * math.log(a) for a in q)
        h_t = -sum(b * math.log(b) for b in p)
        nu, delta = (1.5, 0.5) if h_t > h_s else (0.5, 1.5)
        expected += temperature**2 * (nu * forward + delta * reverse) / 6
    method = BDKD(temperature=temperature, high_weight=1.5, low_weight=0.5)
    terms = terms_of(method, student, teacher, torch.arange(5).repeat(2)[:6])
    assert (terms["forward"] + terms["reverse"]).item() == pytest.approx(expected, rel=1e-9)


def test_equal_logits_cost_nothing_and_give_no_gradient() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    terms = terms_of(BDKD(), student, teacher)
    apart = [term for name, term in terms.items() if not name.startswith("supervised")]
    assert [term.item() for term in apart] == pytest.approx([0, 0, 0], abs=1e-12)
    torch.stack(apart).sum().backward()
    assert student.grad.abs().max() < 1e-12 and teacher.grad.abs().max() < 1e-12


def test_each_loss_reaches_one_network() -> None:
    for of_teacher in (True, False):
        student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
        terms = terms_of(BDKD(), student, teacher)
        sum(v for name, v in terms.items() if name.endswith("_teacher") == of_teacher).backward()
        assert (student.grad is None) == of_teacher
        assert (teacher.grad is None) != of_teacher


def test_the_balancing_carries_no_gradient() -> None:
    student = random_logits(4, 5).requires_grad_()
    teacher = random_logits(8, 5)[4:]
    for divergence in ("balanced", "continuous"):
        forward, reverse = weights_of(divergence, student, teacher)
        assert not forward.requires_grad and not reverse.requires_grad


def test_equal_weights_are_both_and_no_low_weight_is_a_switch() -> None:
    student, teacher = random_logits(2, 8, 5).unbind()
    target = torch.arange(8) % 5
    equal = terms_of(BDKD(high_weight=1.5, low_weight=1.5), student, teacher, target)
    both = terms_of(BDKD(divergence="both", high_weight=2, low_weight=1), student, teacher, target)
    assert {name: value.item() for name, value in equal.items()} == {
        name: value.item() for name, value in both.items()
    }
    forward, reverse = weights_of("balanced", student, teacher, low=0.0, high=1.0)
    assert torch.equal(forward, 1 - reverse) and 0 < forward.sum() < 8


def test_the_other_weightings() -> None:
    for name, expected in {
        "none": (0, 0),
        "forward": (1, 0),
        "reverse": (0, 1),
        "both": (1.5, 1.5),
    }.items():
        forward, reverse = weights_of(name)
        assert (forward.tolist(), reverse.tolist()) == ([expected[0]] * 2, [expected[1]] * 2)
    forward, reverse = weights_of("continuous", slope=2.0)
    gap = [1.017357 - 0.832396, 0.366594 - 1.074368]
    expected = [1 + math.tanh(2 * value) for value in gap]
    assert forward.tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(forward + reverse, torch.full_like(forward, 2.0))


def test_what_each_divergence_consists_of() -> None:
    names = {
        divergence: set(terms_of(BDKD(divergence=divergence), STUDENT, TEACHER))
        - {"supervised", "supervised_teacher", "mutual_teacher"}
        for divergence in ("none", "forward", "reverse", "both", "balanced", "continuous")
    }
    pair = {"forward", "reverse"}
    assert names == {
        **{"none": set(), "forward": {"forward"}, "reverse": {"reverse"}},
        **dict.fromkeys(("both", "balanced", "continuous"), pair),
    }
    assert "mutual_teacher" not in terms_of(BDKD(divergence="none"), STUDENT, TEACHER)


def test_invariances() -> None:
    student, teacher = random_logits(2, 6, 5).unbind()
    target = torch.arange(6) % 5
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = terms_of(BDKD(), student, teacher, target)
    permuted = terms_of(BDKD(), student[:, order], teacher[:, order], order.argsort()[target])
    shifted = terms_of(BDKD(), student + 7 * random_logits(6, 1), teacher - 3, target)
    for name, value in plain.items():
        torch.testing.assert_close(permuted[name], value)
        torch.testing.assert_close(shifted[name], value)


def test_at_high_temperature_the_divergences_are_half_the_variance_of_the_difference() -> None:
    student, teacher = random_logits(2, 6, 5).unbind()
    difference = student - teacher
    difference = difference - difference.mean(1, keepdim=True)
    expected = difference.square().sum(1).mean().item() / (2 * 5)
    for temperature in (1e3, 1e4):
        found = divergences(student, teacher, temperature=temperature)
        assert found["forward"].item() == pytest.approx(expected, rel=1e-2)
        assert found["reverse"].item() == pytest.approx(expected, rel=1e-2)


def test_masked_positions_do_not_count() -> None:
    student, teacher = random_logits(2, 4, 3, 5).unbind()
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    options = {"temperature": 1.0, "t_squared": True}
    ones = torch.ones(4, 3, dtype=torch.float64)
    whole = weighted_divergences(student, teacher, ones, ones, mask=mask, **options)
    only = weighted_divergences(student[mask], teacher[mask], ones[mask], ones[mask], **options)
    for name in whole:
        torch.testing.assert_close(whole[name], only[name])


def test_gradcheck() -> None:
    student, teacher = random_logits(2, 3, 4).unbind()
    forward, reverse = weights_of("balanced", student, teacher)

    def total(logits: torch.Tensor) -> torch.Tensor:
        options = {"temperature": 2.0, "t_squared": True}
        return sum(weighted_divergences(logits, teacher, forward, reverse, **options).values())

    assert torch.autograd.gradcheck(total, student.requires_grad_())


# -- several networks, alternating updates ---------------------------------------------------------


def test_three_networks_learn_by_their_place_in_the_order() -> None:
    teacher, peer, student = random_logits(3, 6, 5).unbind()
    target = torch.arange(6) % 5
    method = BDKD(peers=1)
    assert method.roles() == {"teacher": "teacher", "peer1": "student"}
    assert method.trainable_roles == ("teacher", "peer1")
    terms = terms_of(method, student, teacher, target, peer1=peer)
    kl = {
        (a, b): divergences(b_, a_)["forward"]
        for a, a_ in (("t", teacher), ("p", peer), ("s", student))
        for b, b_ in (("t", teacher), ("p", peer), ("s", student))
    }
    torch.testing.assert_close(terms["mutual_teacher"], (kl["p", "t"] + kl["s", "t"]) / 2)
    torch.testing.assert_close(terms["mutual_peer1"], kl["s", "p"] / 2)
    nu, delta = weights_of("balanced", peer, teacher)
    pair = weighted_divergences(peer, teacher, nu, delta, temperature=1.0, t_squared=True)
    torch.testing.assert_close(terms["forward_peer1"], pair["forward"] / 2)
    nu, delta = weights_of("balanced", student, peer)
    first = weighted_divergences(student, peer, nu, delta, temperature=1.0, t_squared=True)
    nu, delta = weights_of("balanced", student, teacher)
    second = weighted_divergences(student, teacher, nu, delta, temperature=1.0, t_squared=True)
    torch.testing.assert_close(terms["reverse"], (first["reverse"] + second["reverse"]) / 2)
    assert "mutual" not in terms and "forward_teacher" not in terms


class PlainEngine:
    """Forward and an SGD step of single networks; remembers who was updated."""

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        self.networks, self.updated = networks, []

    def forward(self, role: str, batch: Batch) -> ModelOutput:
        return ModelOutput(self.networks[role](batch.inputs))

    def optimize(self, loss: torch.Tensor, *roles: str) -> None:
        for role in roles:
            parameters = list(self.networks[role].parameters())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.5 * gradient
            self.updated.append(role)


def test_alternating_updates_use_the_newest_predictions() -> None:
    torch.manual_seed(0)
    inputs, target = torch.randn(8, 4), torch.arange(8) % 3
    batch = Batch(inputs, target, torch.arange(8))
    networks = {"teacher": nn.Linear(4, 3), "student": nn.Linear(4, 3)}
    method = BDKD(update="alternating", weight=0.5)
    assert method.irregular and not BDKD().irregular
    engine = PlainEngine(networks)
    teacher_before, student_before = (
        networks[role](inputs).detach() for role in ("teacher", "student")
    )
    terms = method.step(engine, batch, NOW)
    assert engine.updated == ["teacher", "student"]
    before = terms_of(BDKD(), student_before, teacher_before, target)
    after = terms_of(BDKD(), student_before, networks["teacher"](inputs).detach(), target)
    torch.testing.assert_close(terms["mutual_teacher"], before["mutual_teacher"])
    torch.testing.assert_close(terms["forward"], after["forward"])
    assert not torch.allclose(terms["forward"], before["forward"])


def test_the_share_of_more_confident_samples_is_recorded() -> None:
    method = BDKD()
    terms_of(method, STUDENT, TEACHER)
    assert method.take_recorded()["student_more_confident"].item() == 0.5


def test_weights_that_are_the_wrong_way_round() -> None:
    with pytest.raises(ValueError, match="low_weight=2 must not exceed high_weight=1"):
        BDKD(high_weight=1, low_weight=2)


# -- training --------------------------------------------------------------------------------------


def test_both_learn_together_from_scratch(data, student) -> None:
    torch.manual_seed(0)
    teacher, alone = ConvNet(width=12), copy.deepcopy(student)
    together = train(BDKD(), student, copy.deepcopy(teacher), data, epochs=3)
    apart = train(BDKD(weight=0.0, teacher_weight=0.0), alone, teacher, data, epochs=3)
    for term in ("forward", "reverse", "mutual_teacher"):
        assert together[-1][term] < 0.8 * apart[-1][term], term
    assert together[-1]["supervised_teacher"] < 0.3 * together[0]["supervised_teacher"]
    accuracy = (student.eval()(data.inputs).argmax(1) == data.target).float().mean()
    assert accuracy > 0.8
