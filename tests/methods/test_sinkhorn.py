from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from kdrun.losses.optimal_transport import samplewise_distance, transport_of_distributions
from kdrun.methods.sinkhorn import PRESETS, Sinkhorn
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import agreement, train

NOW = Progress(0, 1, 0, 1)
CONSTANTS = {"temperature": 2.0, "epsilon": 0.1, "iterations": 20}
STUDENT = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
TEACHER = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


def raw_cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    plan, cost = transport_of_distributions(student, teacher, **CONSTANTS)
    return (plan * cost).sum()


def random_logits(samples: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, samples, classes, dtype=torch.float64, generator=generator).unbind()


def terms(method: Sinkhorn, student: torch.Tensor, teacher: torch.Tensor, progress=NOW):
    batch = Batch(student, torch.zeros(len(student), dtype=torch.long), torch.arange(len(student)))
    teachers = {"teacher": ModelOutput(teacher)}
    return method.losses(ModelOutput(student), teachers, batch, progress)


# -- the worked example: two samples, three classes ----------------------------------------------


def test_cost_plan_and_loss_by_hand() -> None:
    plan, cost = transport_of_distributions(STUDENT, TEACHER, **CONSTANTS)
    expected_cost = torch.tensor([[0.190509, 0.547568], [0.728351, 0.384930]])
    torch.testing.assert_close(cost, expected_cost, atol=1e-6, rtol=0)
    kernel = torch.tensor([[0.148810, 0.004187], [0.000687, 0.021295]])
    torch.testing.assert_close((-cost / 0.1).exp(), kernel, atol=1e-6, rtol=0)
    expected_plan = torch.tensor([[0.970571, 0.029060], [0.029429, 0.970940]])
    torch.testing.assert_close(plan, expected_plan, atol=1e-6, rtol=0)
    rows = torch.tensor([0.999631, 1.000369])
    torch.testing.assert_close(plan.sum(1), rows, atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.ones(2), atol=1e-6, rtol=0)
    assert raw_cost(STUDENT, TEACHER).item() == pytest.approx(0.595994, abs=1e-6)


def test_gradient_by_hand() -> None:
    method = Sinkhorn(preset="glue")
    student = STUDENT.clone().requires_grad_()
    weights = method.weights(NOW)
    # Without beta: the worked example has the release's scale alone.
    loss = weights["sinkhorn"] / 0.8 * terms(method, student, TEACHER)["sinkhorn"]
    loss.backward()
    assert loss.item() == pytest.approx(5.95994e-4, abs=1e-9)
    expected = 1e-4 * torch.tensor([[-1.81788, 2.36601, -0.54813], [-1.20472, 2.48853, -1.28381]])
    torch.testing.assert_close(student.grad, expected, atol=1e-9, rtol=0)


def test_a_detached_plan_would_give_another_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    plan, cost = transport_of_distributions(student, TEACHER, **CONSTANTS)
    (1e-3 * (plan.detach() * cost).sum()).backward()
    detached = 1e-4 * torch.tensor([[-1.43746, 2.02042, -0.58296], [-1.22809, 2.42500, -1.19691]])
    torch.testing.assert_close(student.grad, detached, atol=1e-9, rtol=0)


def test_distillation_term_by_hand() -> None:
    method = Sinkhorn(preset="glue")
    assert terms(method, STUDENT, TEACHER)["kd"].item() == pytest.approx(1.082988, abs=1e-6)
    squared = Sinkhorn(preset="glue", t_squared=True)
    assert terms(squared, STUDENT, TEACHER)["kd"].item() == pytest.approx(4 * 1.082988, abs=4e-6)


def test_agreement_of_both_is_not_zero() -> None:
    assert raw_cost(STUDENT, STUDENT).item() == pytest.approx(0.003248, abs=1e-6)


def test_identical_rows_cost_nothing() -> None:
    rows = STUDENT[:1].expand(4, 3)
    assert raw_cost(rows, rows).item() == 0


def test_one_sample_is_its_l1_distance() -> None:
    assert raw_cost(STUDENT[:1], TEACHER[:1]).item() == pytest.approx(0.190509, abs=1e-6)


# -- properties ---------------------------------------------------------------------------------


def test_the_batch_is_an_unordered_cloud() -> None:
    assert raw_cost(STUDENT, TEACHER.flip(0)).item() == pytest.approx(0.595994, abs=1e-6)
    student, teacher = random_logits()
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    torch.testing.assert_close(
        raw_cost(student[orders[0]], teacher[orders[1]]), raw_cost(student, teacher)
    )


def test_duplicated_samples_double_the_sum_and_keep_the_mean() -> None:
    student, teacher = random_logits()
    twice = torch.cat([student, student]), torch.cat([teacher, teacher])
    for reduction, factor in (("sum", 2), ("mean", 1)):
        method = Sinkhorn(reduction=reduction)
        torch.testing.assert_close(
            terms(method, *twice)["sinkhorn"], factor * terms(method, student, teacher)["sinkhorn"]
        )


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    student, teacher = random_logits()
    student.requires_grad_()
    cost = raw_cost(student, teacher)
    cost.backward()
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(6, dtype=torch.float64))
    shifted = student + torch.arange(6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(raw_cost(shifted, teacher), cost)


def test_cost_per_sample_is_at_most_two() -> None:
    student, teacher = torch.tensor([[90.0, 0.0, 0.0]] * 4), torch.tensor([[0.0, 90.0, 0.0]] * 4)
    assert raw_cost(student, teacher).item() / 4 == pytest.approx(2)


def test_gradient_by_finite_differences() -> None:
    student, teacher = random_logits(3, 4)
    assert torch.autograd.gradcheck(lambda s: raw_cost(s, teacher), student.requires_grad_())


def test_half_precision_logits_give_a_finite_gradient() -> None:
    student = (20 * torch.randn(8, 5)).half().requires_grad_()
    raw_cost(student, (20 * torch.randn(8, 5)).half()).backward()
    assert torch.isfinite(student.grad).all()


def test_samplewise_is_the_l1_distance_of_each_pair() -> None:
    student, teacher = random_logits()
    each = samplewise_distance(student, teacher, temperature=1.0)
    expected = (student.softmax(1) - teacher.softmax(1)).abs().sum(1)
    torch.testing.assert_close(each, expected)
    method = Sinkhorn(preset="glue", variant="samplewise")
    torch.testing.assert_close(terms(method, student, teacher)["sinkhorn"], expected.sum())


# -- options ------------------------------------------------------------------------------------


def test_annealing_is_linear_over_the_epochs() -> None:
    method = Sinkhorn(kd_form="kd_anneal", temperature=4.0)
    assert [method.temperature(Progress(e, 3, 0, 1)) for e in range(3)] == [4, 2.5, 1]
    assert method.temperature(Progress(0, 1, 0, 1)) == 4
    assert Sinkhorn(temperature=4.0).temperature(Progress(2, 3, 0, 1)) == 4


def test_presets_keep_the_released_constants() -> None:
    assert Sinkhorn(preset="glue").weights(NOW) == pytest.approx(
        {"supervised": 0.1, "kd": 0.9, "sinkhorn": 0.8e-3}
    )
    assert Sinkhorn(preset="vision").weights(NOW) == pytest.approx(
        {"supervised": 0.1, "kd": 0.9, "sinkhorn": 1.0}
    )
    released = Sinkhorn(preset="glue").constants
    assert (released.reduction, released.t_squared) == ("sum", False)
    assert (released.sinkhorn_temperature, released.epsilon, released.iterations) == (2, 0.1, 20)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "given",
    [
        {"alpha": 0.0},
        {"kd_form": "kd_anneal"},
        {"temperature": 3.5},
        {"t_squared": True},
        {"t_squared": False},
        {"beta": 0.0},
        {"scale": 8e-4},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"sinkhorn_temperature": 0.55},
        {"epsilon": 0.02},
        {"iterations": 10},
    ],
    ids=str,
)
def test_one_constant_is_overridden_and_no_other(preset: str, given: dict) -> None:
    constants = Sinkhorn(preset=preset, **given).constants
    assert {name: getattr(constants, name) for name in PRESETS[preset]} == PRESETS[preset] | given


def test_samplewise_has_its_own_temperature_unless_one_is_given() -> None:
    assert Sinkhorn(variant="samplewise").constants.sinkhorn_temperature == 1
    given = Sinkhorn(variant="samplewise", sinkhorn_temperature=2.0)
    assert given.constants.sinkhorn_temperature == 2


def test_a_single_output_is_a_regression() -> None:
    method = Sinkhorn(preset="glue")
    method.supervised_loss = lambda output, batch: output.logits.square().mean()
    student, teacher = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    method.setup(ModelOutput(student), {"teacher": ModelOutput(teacher)})
    result = terms(method, student, teacher)
    assert set(result) == set(method.weights(NOW)) == {"supervised", "kd"}
    # Differences 1 and 2 over the temperature 2, squared, mean.
    assert result["kd"].item() == pytest.approx((0.25 + 1) / 2)


def test_points_must_be_those_of_the_logits() -> None:
    with pytest.raises(ValueError, match=r"points=samples: not for logits of shape \(2, 3, 4\)"):
        Sinkhorn(points="samples").setup(ModelOutput(torch.zeros(2, 3, 4)), {})
    with pytest.raises(ValueError, match=r"points=tokens: not for logits of shape \(2, 3\)"):
        Sinkhorn(points="tokens").setup(ModelOutput(torch.zeros(2, 3)), {})


def test_samples_that_do_not_count_are_not_transported() -> None:
    student, teacher = random_logits()
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    method = Sinkhorn(preset="glue")
    torch.testing.assert_close(
        method.sinkhorn(*method.chosen(student, teacher, mask)),
        raw_cost(student[mask], teacher[mask]),
    )


# -- sequences ------------------------------------------------------------------------------------


def sequences(samples: int = 3, length: int = 4, classes: int = 5):
    generator = torch.Generator().manual_seed(0)
    shape = (2, samples, length, classes)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator).unbind()
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    return *logits, mask


def of_points(points: str, **options) -> tuple[Sinkhorn, torch.Tensor]:
    student, teacher, mask = sequences()
    method = Sinkhorn(preset="superglue", points=points, **options)
    method.setup(ModelOutput(student), {})
    return method, method.sinkhorn(*method.chosen(student, teacher, mask))


def cost_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return raw_cost(student, teacher)


def test_tokens_are_one_cloud_of_the_positions_that_count() -> None:
    student, teacher, mask = sequences()
    torch.testing.assert_close(of_points("tokens")[1], cost_of(student[mask], teacher[mask]))


def test_tokens_per_sequence_are_a_cloud_each() -> None:
    student, teacher, mask = sequences()
    parts = [cost_of(s[m], t[m]) for s, t, m in zip(student, teacher, mask, strict=True)]
    torch.testing.assert_close(of_points("tokens_per_sequence")[1], sum(parts))


def test_label_words_are_compared_where_the_response_begins() -> None:
    student, teacher, mask = sequences()
    rows, places, words = torch.arange(3), torch.tensor([1, 2, 0]), torch.tensor([4, 1])
    expected = cost_of(student[rows, places][:, words], teacher[rows, places][:, words])
    torch.testing.assert_close(of_points("label_words", label_words=[4, 1])[1], expected)


def test_label_words_are_what_training_responses_begin_with() -> None:
    _, _, mask = sequences()
    target = torch.tensor([[9, 3, 9, 9], [9, 9, 0, 9], [3, 9, 9, 9]])
    method, loader = Sinkhorn(points="label_words"), [Batch(target, target, rows(3), mask)]
    method.prepare({}, loader)
    assert method.label_words.tolist() == [0, 3]


def of_responses(*responses: list[int]) -> list[Batch]:
    """Batches of one row each: a prompt token 9, then a response, cut or filled up to 4 tokens."""
    filled = [torch.tensor([[9, *response, 9, 9, 9]])[:, :4] for response in responses]
    counted = [torch.arange(4)[None] - 1 for _ in responses]
    return [
        Batch(target, target, rows(1), (place >= 0) & (place < len(response)))
        for target, place, response in zip(filled, counted, responses, strict=True)
    ]


@pytest.mark.parametrize(
    ("given", "responses", "said"),
    [
        (None, [[2, 3], [2, 3]], "begin with 1 different tokens, which are no classes"),
        (None, [[2, 3], [4, 5], [2, 6]], "different responses begin with the token 2, so it"),
        (None, [[token] for token in range(65)], "begin with 65 different tokens"),
        ([2, 5], [[2, 3], [4, 5]], "label_words: no training response begins with 5"),
    ],
)
def test_label_words_that_stand_for_no_classes_are_refused(given, responses, said) -> None:
    with pytest.raises(ValueError, match=said):
        Sinkhorn(points="label_words", label_words=given).inspect(of_responses(*responses))


def test_label_words_that_stand_for_classes() -> None:
    for given in (None, [4, 2]):
        # The second response is the first one cut short.
        batches = of_responses([2, 3, 3], [2, 3], [4, 5])
        Sinkhorn(points="label_words", label_words=given).inspect(batches)
    Sinkhorn(points="tokens").inspect(of_responses([2], [2]))


@pytest.mark.parametrize("given", [None, [2, 3]])
def test_label_words_need_marked_responses(given) -> None:
    target = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing marks where responses begin"):
        method = Sinkhorn(points="label_words", label_words=given)
        method.inspect([Batch(target, target, rows(3))])


def test_label_words_must_be_different_tokens_of_the_vocabulary() -> None:
    for words in ([3], [3, 3]):
        with pytest.raises(ValueError, match="must be two or more different tokens"):
            Sinkhorn(points="label_words", label_words=words)
    method = Sinkhorn(points="label_words", label_words=[1, 5])
    with pytest.raises(ValueError, match="label_words: 5 is no token, the vocabulary has 5"):
        method.setup(ModelOutput(torch.zeros(2, 3, 5)), {})


def one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    target = torch.tensor([[2, 9], [4 + rank, 9]])
    mask = torch.tensor([[True, False], [True, False]])
    method = Sinkhorn(points="label_words")
    method.prepare({}, [Batch(target, target, rows(2), mask)])
    torch.save(method.label_words, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_compare_the_same_label_words(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in (0, 1)] == [[2, 4, 5]] * 2


def rows(count: int) -> torch.Tensor:
    return torch.arange(count)


def test_a_few_tokens_are_drawn_from_those_that_count() -> None:
    student, teacher, mask = sequences()
    method = Sinkhorn(preset="superglue", points="tokens", tokens_at_most=5)
    seen = set()
    for _ in range(20):
        ours, theirs, counted = method.chosen(student, teacher, mask)
        assert ours.shape == (5, 5) and counted.all()
        places = (student.flatten(0, 1)[:, None] == ours).all(-1).nonzero()[:, 0]
        torch.testing.assert_close(teacher.flatten(0, 1)[places].sum(0), theirs.sum(0))
        seen |= set(places.tolist())
    assert seen == set(mask.flatten().nonzero().flatten().tolist())


def test_the_teachers_likeliest_classes_are_kept_and_renormalised() -> None:
    student, teacher, mask = sequences()
    kept = teacher[mask].softmax(-1).sum(0).topk(3).indices
    expected = cost_of(student[mask][:, kept], teacher[mask][:, kept])
    torch.testing.assert_close(of_points("tokens", top_k=3)[1], expected)


def test_positions_that_do_not_count_get_no_gradient() -> None:
    student, teacher, mask = sequences()
    for points in ("tokens", "tokens_per_sequence"):
        leaf = student.clone().requires_grad_()
        method = Sinkhorn(points=points)
        method.sinkhorn(*method.chosen(leaf, teacher, mask)).backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[~mask].abs().max() == 0 and leaf.grad[mask].abs().min() > 0


def test_superglue_has_the_papers_weights() -> None:
    weights = Sinkhorn(preset="superglue").weights(NOW)
    assert weights == pytest.approx({"supervised": 1.0, "kd": 0.1, "sinkhorn": 8e-4})


def test_diagnostics_are_recorded() -> None:
    method = Sinkhorn(preset="glue")
    terms(method, STUDENT, TEACHER)
    recorded = {name: value.item() for name, value in method.take_recorded().items()}
    assert recorded == pytest.approx(
        {
            "sinkhorn_cost": 0.595994 / 2,
            "sinkhorn_diagonal": (0.970571 + 0.970940) / 2,
            "sinkhorn_row_error": 0.000369,
        },
        abs=1e-6,
    )


# -- training -----------------------------------------------------------------------------------


def test_training_lowers_the_transport_cost_below_that_of_kd(data, teacher, student) -> None:
    without = copy.deepcopy(student)
    history = train(Sinkhorn(temperature=1.0), student, teacher, data, epochs=4)
    costs = [epoch["sinkhorn_cost"] for epoch in history]
    assert costs[-1] < 0.3 * costs[0]
    assert agreement(student, teacher, data.inputs) > 0.85
    # The same run with the term switched off still records the cost.
    reference = train(Sinkhorn(temperature=1.0, beta=0.0), without, teacher, data, epochs=4)
    assert costs[-1] < 0.7 * reference[-1]["sinkhorn_cost"]
