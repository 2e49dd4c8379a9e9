"""MST-Distill: the objectives of its three phases, who receives their gradients, its schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from kdrun.layers.masks import SpecialisedTeacher, specialised
from kdrun.losses.divergence import kl_divergence
from kdrun.methods.mst import MST, STUDENT, TARGET, CoTraining, Panel, Specialisation
from kdrun.outputs import ModelOutput, Progress
from kdrun.tasks.classification import Classification
from kdrun.tasks.imitation import Imitation
from tests.methods.training import agreement, digits, train
from tests.tiny import mlp

START = Progress(epoch=0, epochs=100, step=0, steps=1000)
ROLES = ("teacher", "aux_teacher")
NAMES = ("teacher_1", "teacher_2", "aux_teacher_1", "aux_teacher_2")
BATCH = digits(12)


def kl(learner: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return kl_divergence(learner, target, temperature=4.0, t_squared=True)


def networks() -> dict[str, nn.Module]:
    return {role: mlp(seed, 12, 9) for seed, role in enumerate((STUDENT, *ROLES))}


# -- phase 1 ---------------------------------------------------------------------------------------


def cotraining(**options) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    trained = networks()
    outputs = {role: ModelOutput(network(BATCH.inputs)) for role, network in trained.items()}
    method = CoTraining(**options)
    terms = method.losses(outputs.pop(STUDENT), outputs, BATCH, START)
    assert method.weights(START) == {}
    return trained, terms


def test_six_divergences_and_three_supervised_terms() -> None:
    trained, terms = cotraining()
    logits = {role: network(BATCH.inputs) for role, network in trained.items()}
    expected = sum(nn.functional.cross_entropy(z, BATCH.target) for z in logits.values())
    expected += sum(kl(logits[a], logits[b]) for a, b in itertools.permutations(logits, 2))
    assert torch.allclose(sum(terms.values()), expected)


def test_each_network_receives_four_divergences() -> None:
    """Nothing is detached: the student's divergence from the teacher trains the teacher too."""
    trained, terms = cotraining()
    parameters = list(trained["teacher"].parameters())
    of_student = torch.autograd.grad(terms["mutual"], parameters, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in of_student)
    found = torch.autograd.grad(sum(terms.values()), parameters)
    z = {role: network(BATCH.inputs) for role, network in trained.items()}
    t, others = z["teacher"], [z[STUDENT].detach(), z["aux_teacher"].detach()]
    divergences = [kl(t, o) for o in others] + [kl(o, t) for o in others]
    loss = nn.functional.cross_entropy(t, BATCH.target) + sum(divergences)
    for ours, expected in zip(
        found, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
    ):
        assert torch.allclose(ours, expected, atol=1e-6)
    detached = nn.functional.cross_entropy(t, BATCH.target) + sum(divergences[:2])
    other = torch.autograd.grad(detached, parameters)
    assert not torch.allclose(found[0], other[0], atol=1e-4), "detached it would differ"


# -- phase 2 ---------------------------------------------------------------------------------------


def panel() -> tuple[dict[str, SpecialisedTeacher], nn.Module]:
    torch.manual_seed(5)
    plain = networks()
    specialists = {}
    for role in ROLES:
        own = specialised(
            plain[role], ["layers.0.0", "layers.1.0"], BATCH.inputs, heads=3, reduction=1
        )
        specialists |= {f"{role}_{number}": s for number, s in enumerate(own, start=1)}
    return specialists, plain[STUDENT].eval().requires_grad_(False)


def test_each_mask_approaches_the_student_by_itself() -> None:
    specialists, target = panel()
    method = Specialisation(names=list(NAMES))
    assert method.trainable_roles == NAMES[1:]
    others = {name: specialists[name] for name in NAMES[1:]} | {TARGET: target}
    student = method.wrap(specialists[NAMES[0]], others, BATCH.inputs)
    outputs = {role: ModelOutput(network(BATCH.inputs)) for role, network in others.items()}
    terms = method.losses(ModelOutput(student(BATCH.inputs)), outputs, BATCH, START)
    assert list(terms) == [f"kl_{name}" for name in NAMES]
    for name in NAMES:
        assert torch.allclose(
            terms[f"kl_{name}"], kl(specialists[name](BATCH.inputs), target(BATCH.inputs))
        )
        gradients = {
            other: torch.autograd.grad(
                terms[f"kl_{name}"], list(specialists[other].parameters()),
                retain_graph=True, allow_unused=True,
            )
            for other in NAMES
        }  # fmt: skip
        for other, found in gradients.items():
            assert all((gradient is None) == (other != name) for gradient in found)
    deployed = method.deploy(student)
    assert isinstance(deployed, Panel)
    assert {name.split(".")[1] for name in deployed.state_dict()} == set(NAMES)


def test_the_panel_tells_masked_from_plain() -> None:
    specialists, target = panel()
    output = Panel(specialists, target)(BATCH.inputs)
    assert torch.equal(output.logits, target(BATCH.inputs))
    for name, specialist in specialists.items():
        assert torch.equal(output.extra["plain"][name], specialist.teacher(BATCH.inputs))
        assert torch.equal(output.extra["masked"][name], specialist(BATCH.inputs))
        feature = specialist.teacher.layers[0][0](BATCH.inputs.flatten(1))
        if name.endswith("_1"):
            expected = specialist.mask(feature).std(dim=-1)
            assert torch.allclose(output.extra["spread"][name], expected)
        assert not specialist.mask._forward_hooks


def test_the_panel_is_judged_by_its_divergence_from_the_student() -> None:
    specialists, target = panel()
    teachers = {"teacher": list(NAMES[:2]), "aux_teacher": list(NAMES[2:])}
    task = Imitation(task=Classification(num_classes=10), teachers=teachers, temperature=4.0)
    metrics, judged = task.metrics(), Panel(specialists, target)
    for rows in (slice(0, 8), slice(8, 12)):
        task.update_metrics(metrics, task.forward(judged, BATCH.rows(rows)), BATCH.rows(rows))
    found = task.compute(metrics)
    with torch.no_grad():
        approached = target(BATCH.inputs)
        expected = {name: kl(s(BATCH.inputs), approached).item() for name, s in specialists.items()}
        plain = kl(specialists["teacher_1"].teacher(BATCH.inputs), approached).item()
    for name, value in expected.items():
        assert found[f"kl_{name}"] == pytest.approx(value, rel=1e-4)
        assert found[f"spread_{name}"] > 0
    assert found["plain_kl_teacher_1"] == pytest.approx(plain, rel=1e-4)
    assert found["plain_kl_teacher_1"] == found["plain_kl_teacher_2"]
    assert found["kl"] == pytest.approx(sum(expected.values()) / 2, rel=1e-4)


# -- phase 3 ---------------------------------------------------------------------------------------


def routed(**options) -> tuple[MST, ModelOutput, dict[str, ModelOutput]]:
    torch.manual_seed(0)
    method = MST(**options)
    plain = networks()
    teachers = method.wrap_teachers({role: plain[role] for role in ROLES}, BATCH.inputs)
    with torch.no_grad():
        outputs = {role: ModelOutput(net(BATCH.inputs)) for role, net in teachers.items()}
    student = ModelOutput(plain[STUDENT](BATCH.inputs))
    method.setup(student, outputs)
    return method, student, outputs


def test_the_objective() -> None:
    method, student, teachers = routed(k=2)
    assert tuple(teachers) == NAMES
    terms = method.losses(student, teachers, BATCH, START)
    gates = torch.softmax(method.gate(student.logits), -1)
    expected, counts = 0.0, dict.fromkeys(NAMES, 0)
    for row in range(len(BATCH)):
        for number in gates[row].argsort(descending=True)[:2].tolist():
            counts[NAMES[number]] += 1
            expected += kl(
                student.logits[row : row + 1], teachers[NAMES[number]].logits[row : row + 1]
            ).item()
    assert terms["kd"].item() == pytest.approx(expected / (2 * len(BATCH)), rel=1e-4)
    recorded = method.take_recorded()
    for name, count in counts.items():
        assert recorded[f"share_{name}"].item() == pytest.approx(count / (2 * len(BATCH)))
    losses = [nn.functional.cross_entropy(t.logits, BATCH.target) for t in teachers.values()]
    assert recorded["teachers_supervised"].item() == pytest.approx(
        torch.stack(losses).mean().item()
    )
    assert set(terms) == {"supervised", "kd", "balance"}


def test_the_gate_is_two_linear_layers() -> None:
    method, *_ = routed()
    assert [tuple(layer.weight.shape) for layer in method.gate] == [(20, 10), (4, 20)]


def test_only_the_balance_trains_the_gate_and_it_reaches_the_student() -> None:
    method, student, teachers = routed()
    terms = method.losses(student, teachers, BATCH, START)
    gate = list(method.gate.parameters())
    unused = torch.autograd.grad(terms["kd"], gate, retain_graph=True, allow_unused=True)
    assert unused == (None,) * len(gate)
    (of_student,) = torch.autograd.grad(terms["balance"], student.logits, retain_graph=True)
    assert of_student.abs().sum() > 0
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["balance"], gate))


def test_soft_routing_trains_the_gate_by_the_divergence() -> None:
    method, student, teachers = routed(routing="soft")
    terms = method.losses(student, teachers, BATCH, START)
    gates = torch.softmax(method.gate(student.logits), -1)
    mixture = sum(gates[:, j, None] * teachers[name].logits for j, name in enumerate(NAMES))
    assert torch.allclose(terms["kd"], kl(student.logits, mixture), atol=1e-6)
    found = torch.autograd.grad(terms["kd"], list(method.gate.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize(
    ("epoch", "kd", "balance"),
    [
        (0, 1.0, 1.0), (1, 0.5, 0.9), (10, 0.5, 0.9), (11, 0.5, 0.81), (30, 0.5, 0.729),
        (31, 0.25, 0.6561), (99, 0.0625, 0.9**10),
    ],
)  # fmt: skip
def test_the_weights_decay_by_steps(epoch: int, kd: float, balance: float) -> None:
    weights = MST().weights(Progress(epoch, 100, 0, 1))
    assert weights == pytest.approx({"supervised": 1.0, "kd": kd, "balance": balance})


def test_which_teachers_there_are() -> None:
    assert tuple(routed(masks=False)[2]) == ROLES
    assert tuple(routed(layers=1)[2]) == ("teacher_1", "aux_teacher_1")
    assert tuple(routed(aux_layers=[])[2]) == NAMES[:2]
    chosen = {"teacher_layers": ["classifier"], "aux_layers": ["layers.0.0"]}
    assert tuple(routed(**chosen)[2]) == ("teacher_1", "aux_teacher_1")
    with pytest.raises(ValueError, match="k=5: there are 4 specialised teachers"):
        routed(k=5)
    with pytest.raises(ValueError, match="nothing to choose from"):
        routed(aux_layers=[], layers=1)


def test_masks_add_up_only_for_compatibility() -> None:
    plain = networks()
    for compatible in (False, True):
        method = MST(compat_cumulative_masks=compatible)
        teachers = method.wrap_teachers({role: plain[role] for role in ROLES}, BATCH.inputs)
        assert [len(teacher.masks) for teacher in teachers.values()] == [1, 1, 1, 1]
        met = method.teachers_of_phase_3(teachers)
        assert tuple(met) == NAMES
        counts = [len(teacher.masks) for teacher in met.values()]
        assert counts == ([1, 2, 1, 2] if compatible else [1, 1, 1, 1])
        assert all(met[name].mask is teachers[name].mask for name in NAMES)


def test_balance_of_both_kinds() -> None:
    values = {}
    for mode in ("KL", "CV"):
        method, student, teachers = routed(lb_mode=mode)
        values[mode] = method.losses(student, teachers, BATCH, START)["balance"].item()
        gates = torch.softmax(method.gate(student.logits), -1).sum(0)
    assert values["CV"] == pytest.approx((gates.std() / gates.mean()).item(), rel=1e-4)
    assert values["KL"] != values["CV"]


def test_training_brings_the_student_to_its_teachers(data, teacher, student) -> None:
    """Both roles are given the same network, so whichever is chosen teaches the same."""
    history = train(MST(masks=False), student, teacher, data, epochs=4)
    assert history[-1]["kd"] < 0.3 * history[0]["kd"]
    assert all(epoch["balance"] < 0.05 for epoch in history)
    for epoch in history:
        assert epoch["share_teacher"] + epoch["share_aux_teacher"] == pytest.approx(1, abs=1e-5)
    assert agreement(student, teacher, data.inputs) > 0.9
