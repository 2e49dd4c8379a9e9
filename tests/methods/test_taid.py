from __future__ import annotations

from functools import partial

import pytest
import torch

from kdrun.losses.chunked import mean_over_positions
from kdrun.methods.taid import TAID, interpolated, interpolated_cross_entropy
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


def share(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def loss_and_kl(t: float, student: torch.Tensor = STUDENT, **options):
    per_position = partial(interpolated_cross_entropy, t=share(t))
    cross_entropy, entropy = mean_over_positions(per_position, student, TEACHER, **options)
    return cross_entropy, cross_entropy - entropy


def step(method: TAID, loss: float, number: int, steps: int) -> None:
    method.advance(torch.tensor(loss), Progress(0, 1, number, steps))


# -- the worked example: two positions, three classes ---------------------------------------------


@pytest.mark.parametrize(
    ("t", "loss", "kl"),
    [(0.0, 0.748984, 0.0), (0.4, 0.845433, 0.029401), (1.0, 1.061017, 0.219552)],
)
def test_loss_by_hand(t: float, loss: float, kl: float) -> None:
    values = loss_and_kl(t)
    assert [value.item() for value in values] == pytest.approx([loss, kl], abs=1e-6)


def test_target_by_hand_mixes_logits_not_probabilities() -> None:
    target = interpolated(STUDENT, TEACHER, share(0.4)).softmax(-1)
    expected = [[0.723624, 0.178444, 0.097932], [0.134321, 0.665296, 0.200383]]
    torch.testing.assert_close(target, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    mixed = 0.6 * STUDENT.softmax(-1) + 0.4 * TEACHER.softmax(-1)
    assert mixed[0, 0].item() == pytest.approx(0.713939, abs=1e-6)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.0, [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        (0.4, [[-0.029192, 0.033142, -0.003951], [-0.013907, 0.060845, -0.046938]]),
    ],
)
def test_gradient_by_hand(t: float, expected: list) -> None:
    student = STUDENT.clone().requires_grad_()
    loss_and_kl(t, student)[0].backward()
    torch.testing.assert_close(
        student.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_masked_positions_change_nothing_and_get_no_gradient() -> None:
    mask = torch.tensor([True, False])
    student = STUDENT.clone().requires_grad_()
    loss, _ = loss_and_kl(0.4, student, mask=mask)
    loss.backward()
    assert student.grad[1].abs().max() == 0 and student.grad[0].abs().max() > 0
    other = STUDENT.clone()
    other[1] = torch.tensor([5.0, -7.0, float("nan")])
    assert loss_and_kl(0.4, other, mask=mask)[0] == loss
    nothing, _ = loss_and_kl(0.4, student, mask=torch.zeros(2, dtype=torch.bool))
    assert nothing.item() == 0


@pytest.mark.parametrize("t", [0.0, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("banned_by", ["student", "teacher", "both"])
def test_a_class_that_is_ruled_out_adds_nothing(t: float, banned_by: str) -> None:
    bans = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    ours = STUDENT + (0 if banned_by == "teacher" else bans)
    theirs = TEACHER + (0 if banned_by == "student" else bans)
    ours.requires_grad_()
    values = interpolated_cross_entropy(ours, theirs, share(t))
    values[:, 0].sum().backward()
    assert values.isfinite().all() and ours.grad.isfinite().all()
    if banned_by == "both":
        expected = interpolated_cross_entropy(STUDENT[:, :2], TEACHER[:, :2], share(t))
        torch.testing.assert_close(values, expected)


# -- the schedule ------------------------------------------------------------------------------


def test_schedule_by_hand() -> None:
    method = TAID(alpha=0.1, beta=0.9)
    seen = []
    for number, loss in enumerate([2.0, 1.9, 1.8, 2.1]):
        step(method, loss, number, 1000)
        seen.append((method.t.item(), method.momentum.item()))
    assert [t for t, _ in seen] == pytest.approx([0.4, 0.430075, 0.458710, 0.485668], abs=1e-6)
    assert [m for _, m in seen] == pytest.approx([0, 0.005, 0.009763, -0.007880], abs=1e-6)


def test_the_line_is_the_floor() -> None:
    method = TAID(alpha=5e-4)
    seen = []
    for number, loss in enumerate([2.0, 1.9, 1.8, 2.1]):
        step(method, loss, number, 100)
        seen.append(method.t.item())
    assert seen == pytest.approx([0.4, 0.406, 0.412, 0.418], abs=1e-9)


def test_without_adaptation_t_is_the_line() -> None:
    method = TAID(alpha=0.5, adaptive=False, t_start=0.2)
    for number in range(5):
        step(method, 2.0 - number, number, 10)
    assert method.t.item() == pytest.approx(0.2 + 0.8 * 0.4)


def test_t_never_falls_and_never_passes_its_end() -> None:
    method = TAID(alpha=0.5, t_end=0.9)
    losses = 2 + torch.randn(200, generator=torch.Generator().manual_seed(0))
    seen = []
    for number, loss in enumerate(losses):
        step(method, float(loss), number, 200)
        seen.append(method.t.item())
    assert seen == sorted(seen) and seen[-1] == pytest.approx(0.9)


def test_alpha_follows_the_length_of_training_unless_it_is_given() -> None:
    paper, scaled = TAID(alpha=5e-4), TAID()
    for method in (paper, scaled):
        step(method, 2.0, 0, 10_000)
        step(method, 2.0, 1, 10_000)
    assert paper.t == scaled.t and paper.t.item() == pytest.approx(0.4 + 5e-4 * 0.5 * 0.6)


def test_a_loss_that_is_not_finite_leaves_the_state() -> None:
    method = TAID(alpha=0.1)
    step(method, 2.0, 0, 100)
    step(method, 1.9, 1, 100)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step(method, float("nan"), 2, 100)
    assert before == method.state_dict()


def test_t_moves_in_training_only() -> None:
    method = TAID(alpha=0.5)
    batch = Batch(STUDENT, torch.zeros(2, dtype=torch.long), torch.arange(2))
    teachers = {"teacher": ModelOutput(TEACHER)}
    for training, moves in ((True, True), (False, False)):
        method.train(training)
        before = method.t.clone()
        for number in range(3):
            now = Progress(0, 1, number, 10)
            method.losses(ModelOutput(STUDENT), teachers, batch, now)
            method.after_step(now)
        assert bool(method.t > before) is moves


def test_the_state_is_saved() -> None:
    method, again = TAID(alpha=0.1), TAID(alpha=0.1)
    for number, loss in enumerate([2.0, 1.9, 1.8]):
        step(method, loss, number, 1000)
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        step(one, 2.1, 3, 1000)
    assert again.t.item() == method.t.item() == pytest.approx(again.t.item())
    assert set(method.state_dict()) == {"t", "momentum", "previous"}


def test_the_supervised_loss_has_the_rest() -> None:
    method = TAID(distil_ratio=0.7)
    batch = Batch(STUDENT, torch.tensor([0, 1]), torch.arange(2))
    now = Progress(0, 1, 0, 10)
    terms = method.losses(ModelOutput(STUDENT), {"teacher": ModelOutput(TEACHER)}, batch, now)
    assert set(terms) == {"taid", "supervised"}
    assert method.weights(now) == pytest.approx({"taid": 0.7, "supervised": 0.3})
    assert TAID().weights(now) == {}


def test_a_start_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t_start=0.9 lies beyond t_end=0.5"):
        TAID(t_start=0.9, t_end=0.5)


# -- training ------------------------------------------------------------------------------


def test_training_brings_the_student_to_the_teacher(data, teacher, student) -> None:
    history = train(TAID(t_start=0.2), student, teacher, data, epochs=5)
    shares = [epoch["taid_t"] for epoch in history]
    assert shares == sorted(shares) and shares[-1] > 0.9
    assert any(epoch["taid_adaptive"] > 0.5 for epoch in history)
    assert agreement(student, teacher, data.inputs) > 0.85
