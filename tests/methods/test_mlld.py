from __future__ import annotations

import pytest
import torch

from kdrun.methods.mlld import MLLD, unsure
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

NOW = Progress(0, 1, 0, 1)
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


def outputs() -> tuple[ModelOutput, ModelOutput, Batch]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    student = ModelOutput(logits[0], views={"strong": ModelOutput(logits[1])})
    teacher = ModelOutput(logits[2], views={"strong": ModelOutput(logits[3])})
    return student, teacher, Batch(logits[0], torch.arange(6) % 5, torch.arange(6))


def masks(teacher: ModelOutput) -> tuple[list[bool], list[bool]]:
    """Unsure samples and rare classes, with medians by sorting."""
    p = teacher.logits.softmax(1)
    confidence, share = p.max(1).values.tolist(), p.sum(0).tolist()
    middle = sorted(confidence)
    samples = [c <= (middle[2] + middle[3]) / 2 for c in confidence]
    classes = [c <= sorted(share)[2] for c in share]
    assert (sum(samples), sum(classes)) == (3, 3)
    return samples, classes


def levels(student, teacher, temperature: float) -> tuple[list[float], list[float], list[float]]:
    """Instance loss of each sample, class loss of each class, batch loss of each sample."""
    p, q = ((z / temperature).softmax(1) for z in (student, teacher))
    instance = [
        temperature**2 * float((b * (b / a).log()).sum()) for a, b in zip(p, q, strict=True)
    ]
    by_class = [
        sum(float(q[:, i] @ q[:, j] - p[:, i] @ p[:, j]) ** 2 for j in range(5)) for i in range(5)
    ]
    by_sample = [sum(float(q[i] @ q[j] - p[i] @ p[j]) ** 2 for j in range(6)) for i in range(6)]
    return instance, by_class, by_sample


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_released_code_with_its_quirks() -> None:
    student, teacher, batch = outputs()
    terms = MLLD(variant="code").losses(student, {"teacher": teacher}, batch, NOW)
    weak = [levels(student.logits, teacher.logits, t) for t in TEMPERATURES]
    strong = [
        levels(student.views["strong"].logits, teacher.views["strong"].logits, t)
        for t in TEMPERATURES
    ]
    samples, classes = masks(teacher)
    expected = sum(mean(samples) * mean(w[0]) for w in weak)
    expected += sum(mean(s[0]) for s in strong[:3]) + sum(mean(w[0]) for w in weak[3:])
    assert terms["instance"].item() == pytest.approx(expected)
    expected = sum(mean(classes) * mean(w[1]) for w in weak)
    assert terms["class"].item() == pytest.approx(expected)
    expected = sum(mean(samples) * mean(w[2]) for w in weak)
    assert terms["batch"].item() == pytest.approx(expected)


def test_paper_masks_samples_and_classes_and_uses_both_views() -> None:
    student, teacher, batch = outputs()
    terms = MLLD(variant="paper").losses(student, {"teacher": teacher}, batch, NOW)
    weak = [levels(student.logits, teacher.logits, t) for t in TEMPERATURES]
    strong = [
        levels(student.views["strong"].logits, teacher.views["strong"].logits, t)
        for t in TEMPERATURES
    ]
    samples, classes = masks(teacher)
    for number, (term, mask) in enumerate(
        [("instance", samples), ("class", classes), ("batch", samples)]
    ):
        expected = sum(
            mean([m * v for m, v in zip(mask, w[number], strict=True)]) + mean(s[number])
            for w, s in zip(weak, strong, strict=True)
        )
        assert terms[term].item() == pytest.approx(expected), term


def test_doubt_is_told_in_the_precision_of_the_logits() -> None:
    # The largest probabilities fall short of 1 by 2e-9, 2e-10 and 2e-11: one number in float32.
    logits = torch.tensor([[20.0, 0.0], [22.3, 0.0], [24.6, 0.0]], dtype=torch.float64)
    samples, _ = unsure(logits)
    assert samples.tolist() == [True, True, False]
    assert unsure(logits.float())[0].tolist() == [True, True, True]
    assert unsure(logits.bfloat16() / 8)[0].tolist() == [True, True, False]


def test_both_views_are_supervised() -> None:
    student, teacher, batch = outputs()
    terms = MLLD().losses(student, {"teacher": teacher}, batch, NOW)
    for term, output in [
        ("supervised", student),
        ("supervised_strong", student.views["strong"]),
    ]:
        expected = torch.nn.functional.cross_entropy(output.logits, batch.target)
        torch.testing.assert_close(terms[term], expected)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_training_brings_the_student_to_the_teacher(data, teacher, student, variant) -> None:
    noise = torch.randn(data.inputs.shape, generator=torch.Generator().manual_seed(0))
    two_views = Batch(
        data.inputs, data.target, data.index, views={"strong": data.inputs + 0.2 * noise}
    )
    method = MLLD(variant=variant)
    # Five temperatures, their squares and sums over pairs make large gradients.
    history = train(method, student, teacher, two_views, epochs=4, learning_rate=0.01)
    for term in ("instance", "class", "batch"):
        assert history[-1][term] < 0.5 * history[0][term], term
    assert agreement(student, teacher, data.inputs) > 0.9
