"""Hand numbers, and which gradient reaches which head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kdrun.layers.dual_head import DualHead
from kdrun.methods.dho import ALPHAS, BETAS, DHO, gradient_cosine
from kdrun.outputs import Batch, ModelOutput, Progress
from tests.methods.training import ConvNet, Session, agreement, start, train, weighted_sum

NOW = Progress(0, 1, 0, 10)


class Given(DHO):
    """Heads whose logits are handed over, with no network behind them."""

    def of_head(self, output: ModelOutput, head: str) -> Tensor:
        return output.features[head]


def given(supervised: list, distilled: list) -> ModelOutput:
    heads = {"supervised": torch.tensor(supervised), "distilled": torch.tensor(distilled)}
    return ModelOutput(heads["supervised"], heads)


def by_hand(**options) -> tuple[DHO, dict[str, Tensor]]:
    method = Given(**options)
    student = given([[2.0, 0, -1], [0, 1, 0]], [[1.0, 0, 0], [0, 2, 0]])
    student.unlabelled = given([[0.0, 0, 0]], [[0.0, 0, 0]])
    teacher = ModelOutput(torch.tensor([[4.0, 0, 0], [0, 0, 3]]))
    teacher.unlabelled = ModelOutput(torch.tensor([[2.0, 0, 0]]))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 2]), torch.arange(2))
    return method, method.losses(student, {"teacher": teacher}, batch, NOW)


def test_by_hand() -> None:
    method, terms = by_hand()
    assert terms["supervised"].item() == pytest.approx(0.86065, abs=1e-5)
    assert terms["labelled"].item() == pytest.approx(1.60130, abs=1e-5)
    assert terms["unlabelled"].item() == pytest.approx(0.49314, abs=1e-5)
    total = weighted_sum(terms, method.weights(NOW))
    assert total.item() == pytest.approx(1.47754, abs=1e-5)


def test_the_plain_sum() -> None:
    method, terms = by_hand(combination="sum")
    assert weighted_sum(terms, method.weights(NOW)).item() == pytest.approx(2.95509, abs=1e-5)


def with_pool(data: Batch, labelled: int = 32, pool: int = 64) -> Batch:
    batch = data.rows(slice(labelled))
    others = data.rows(slice(labelled, labelled + pool))
    batch.unlabelled = replace(others, target=torch.full_like(others.target, -1))
    return batch


def session(data: Batch, teacher: nn.Module, **options) -> Session:
    torch.manual_seed(0)
    return start(DHO(**options), ConvNet(width=4), teacher, with_pool(data))


def head_of(session: Session) -> DualHead:
    head = session.student.network.classifier
    assert isinstance(head, DualHead)
    return head


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


def test_each_loss_reaches_its_own_head_and_both_reach_the_backbone(data, teacher) -> None:
    for term, own, other in (
        ("supervised", "supervised", "distilled"),
        ("labelled", "distilled", "supervised"),
        ("unlabelled", "distilled", "supervised"),
    ):
        running = session(data, teacher)
        running.terms(with_pool(data), NOW)[term].backward()
        head = head_of(running)
        assert all(g is None for g in gradients(getattr(head, other)))
        assert all(g.abs().sum() > 0 for g in gradients(getattr(head, own)))
        assert all(g is not None for g in gradients(running.student.network.stage1))
        assert not any(p.requires_grad for p in teacher.parameters())


def test_agreement_gives_the_distilled_head_no_gradient(data, teacher) -> None:
    running = session(data, teacher)
    batch = with_pool(data)
    student, _ = running.forward(batch)
    theirs = running.method.of_head(student, "distilled").detach() + 3
    others = running.method.of_head(student.unlabelled, "distilled").detach() - 1
    agreeing = ModelOutput(theirs, unlabelled=ModelOutput(others))
    terms = running.method.losses(student, {"teacher": agreeing}, batch, NOW)
    (terms["labelled"] + terms["unlabelled"]).backward()
    assert terms["labelled"].item() == pytest.approx(0, abs=1e-6)
    for gradient in gradients(head_of(running).distilled):
        assert gradient.abs().max() < 1e-6


def test_lambda_rescales_the_distilled_heads_gradient_but_does_not_turn_it(data, teacher) -> None:
    found = []
    for weight in (0.2, 0.6):
        running = session(data, teacher, supervised_weight=weight)
        running.total(with_pool(data), NOW).backward()
        found.append(head_of(running).distilled.weight.grad)
    torch.testing.assert_close(found[0] / 0.8, found[1] / 0.4)


def test_labels_of_the_unlabelled_are_not_read(data, teacher) -> None:
    running = session(data, teacher)
    batch = with_pool(data)
    expected = running.total(batch, NOW)
    torch.manual_seed(0)
    shuffled = replace(batch.unlabelled, target=torch.randint(10, batch.unlabelled.target.shape))
    running = session(data, teacher)
    assert running.total(replace(batch, unlabelled=shuffled), NOW) == expected


@pytest.mark.parametrize(("weight", "alpha"), [(1.0, 1.0), (0.0, 0.0)])
def test_where_one_head_learns_it_alone_predicts(data, teacher, weight, alpha) -> None:
    running = session(data, teacher, supervised_weight=weight)
    assert head_of(running).alpha == alpha and running.method.mixture == "fixed"


def test_a_single_head_takes_both_losses(data, teacher) -> None:
    running = session(data, teacher, heads="single")
    classifier = running.student.network.classifier
    assert isinstance(classifier, nn.Linear)
    for term in ("supervised", "unlabelled"):
        classifier.weight.grad = None
        running.terms(with_pool(data), NOW)[term].backward()
        assert classifier.weight.grad.abs().sum() > 0


def test_heads_that_start_as_the_classifier(data, teacher) -> None:
    head = head_of(session(data, teacher, head_init="classifier"))
    assert torch.equal(head.supervised.weight, head.distilled.weight)
    head = head_of(session(data, teacher))
    assert not torch.equal(head.supervised.weight, head.distilled.weight)
    cosine = head_of(session(data, teacher, head_init="classifier", distilled_head="cosine"))
    assert torch.equal(cosine.supervised.weight, cosine.distilled.linear.weight)
    assert cosine.distilled.scale == 100


def outputs(running: Session, data: Batch) -> list[tuple[ModelOutput, Batch]]:
    running.student.network.eval()
    with torch.no_grad():
        return [(running.student(part), part) for part in (data.rows(slice(9)), data)]


def test_the_search_takes_the_best_pair_on_all_batches(data, teacher) -> None:
    running = session(data, teacher)
    held_out = data.rows(slice(1000, 1200))
    pairs = outputs(running, held_out)
    running.method.calibrate(running.student.network, iter(pairs))
    head = head_of(running)
    best = (-1, 0.0, 0.0)
    for beta in BETAS:
        for alpha in ALPHAS:
            right = 0
            for output, batch in pairs:
                c = running.method.of_head(output, "supervised").softmax(-1)
                k = (running.method.of_head(output, "distilled") / beta).softmax(-1)
                mixed = torch.tensor(alpha) * c + (1 - torch.tensor(alpha)) * k
                right += int((mixed.argmax(-1) == batch.target).sum())
            if right > best[0]:
                best = (right, alpha, beta)
    assert (float(head.alpha), float(head.beta)) == pytest.approx(best[1:])


def test_a_fixed_mixture_runs_no_network(data, teacher) -> None:
    running = session(data, teacher, mixture="fixed", alpha=0.4, beta=0.5)

    def never():
        raise AssertionError("validation was run")
        yield

    running.method.calibrate(running.student.network, never())
    head = head_of(running)
    assert (float(head.alpha), float(head.beta)) == pytest.approx((0.4, 0.5))


def test_the_conflict_of_gradients_is_recorded(data, teacher) -> None:
    running = session(data, teacher, conflict_every=2)
    running.terms(with_pool(data), NOW)
    measured = running.method.take_recorded()["gradient_cosine"]
    assert -1 <= measured <= 1 and measured != 0
    running.terms(with_pool(data), Progress(0, 1, 1, 10))
    assert torch.equal(running.method.take_recorded()["gradient_cosine"], measured)


def test_gradient_cosine_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    unused = nn.Parameter(torch.zeros(3))
    cosine = gradient_cosine(p[0] * 3, (p * torch.tensor([3.0, 4.0])).sum(), [p, unused])
    assert cosine.item() == pytest.approx(0.6)


def test_it_refuses_a_student_without_a_linear_classifier(data, teacher) -> None:
    with pytest.raises(ValueError, match="linear classifier"):
        start(DHO(), nn.Sequential(nn.Flatten(), nn.ReLU()), teacher, with_pool(data))


def test_it_learns_from_the_unlabelled(data, teacher) -> None:
    """With one label per class, the distilled head comes to agree with the teacher on others."""
    torch.manual_seed(0)
    student = ConvNet(width=4)
    batch = with_pool(data, 32, 1500)
    small = replace(batch, unlabelled=None)
    running = start(DHO(), student, teacher, batch)
    optimizer = torch.optim.SGD(running.parameters(), 0.05, momentum=0.9)
    held_out = data.inputs[1550:]
    before = agreement(student, teacher, held_out)
    student.train()
    order = torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = torch.randperm(1500, generator=order)[:64]
        pool = batch.unlabelled
        part = replace(
            pool, inputs=pool.inputs[rows], target=pool.target[rows], index=pool.index[rows]
        )
        optimizer.zero_grad()
        running.total(replace(small, unlabelled=part), NOW).backward()
        optimizer.step()
    assert agreement(student, teacher, held_out) > max(0.6, before + 0.3)


def test_training_without_unlabelled_samples_is_refused(data, teacher, student) -> None:
    with pytest.raises(AssertionError):
        train(DHO(), student, teacher, data, epochs=1)
