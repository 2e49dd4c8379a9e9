from __future__ import annotations

import pytest
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn
from torch.nn import functional as F

from kdrun.losses.divergence import entropy, kl_divergence
from kdrun.methods.ofa import OFA, target_enhanced_coefficients, target_enhanced_cross_entropy
from kdrun.models.external import timm_model
from kdrun.models.small_cnn import SmallCNN
from kdrun.outputs import Batch, Progress
from tests.methods.training import ConvNet, agreement, start, train

NOW = Progress(0, 1, 0, 1)
LOGITS = torch.tensor([[1.0, 2.0, 0.0], [0.5, -0.5, 1.5]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])


def loss(student=LOGITS, teacher=TEACHER, target=TARGET, *, exponent=1.0, **options):
    return target_enhanced_cross_entropy(student, teacher, target, exponent=exponent, **options)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 1.27470), (1.5, 1.35875)])
def test_by_hand(exponent: float, expected: float) -> None:
    assert loss(exponent=exponent).item() == pytest.approx(expected, abs=1e-5)
    assert F.cross_entropy(LOGITS, TARGET).item() == pytest.approx(0.90761, abs=1e-5)


def test_coefficients_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    target = torch.tensor([0])
    code = target_enhanced_coefficients(p, target, exponent=2.0, variant="code")
    torch.testing.assert_close(code, torch.tensor([[1.25, 0.09, 0.04]]))
    paper = target_enhanced_coefficients(p, target, exponent=2.0, variant="paper")
    torch.testing.assert_close(paper, torch.tensor([[2.25, 0.3, 0.2]]))


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.4, 3.0])
def test_no_class_is_pushed_away(variant, exponent: float) -> None:
    teacher = (20 * random_logits(64, 7)).softmax(1)
    target = torch.arange(64) % 7
    found = target_enhanced_coefficients(teacher, target, exponent=exponent, variant=variant)
    assert (found >= 0).all() and torch.isfinite(found).all()


def test_at_exponent_one_it_is_the_cross_entropy_to_the_teacher() -> None:
    student, teacher = random_logits(2, 6, 5).unbind()
    target = torch.arange(6) % 5
    for temperature in (1.0, 3.0):
        value = loss(student, teacher, target, temperature=temperature)
        divergence = kl_divergence(student, teacher, temperature=temperature, t_squared=False)
        torch.testing.assert_close(value - entropy(teacher, temperature).mean(), divergence)


def test_the_paper_adds_the_hard_label() -> None:
    student, teacher = random_logits(2, 6, 5).unbind()
    target = torch.arange(6) % 5
    both = loss(student, teacher, target) + F.cross_entropy(student, target)
    torch.testing.assert_close(loss(student, teacher, target, variant="paper"), both)


def test_gradient_at_agreement() -> None:
    logits = random_logits(6, 5)
    target = torch.arange(6) % 5
    gradients = {}
    for exponent in (1.0, 1.5):
        student = logits.clone().requires_grad_()
        loss(student, logits, target, exponent=exponent).backward()
        gradients[exponent] = student.grad
    assert gradients[1.0].abs().max() < 1e-12
    of_target = gradients[1.5].gather(1, target[:, None])
    assert (of_target < 0).all(), "the logit of the target rises"


def test_the_naive_loop() -> None:
    student, teacher = random_logits(2, 4, 3).unbind()
    target, exponent = torch.tensor([2, 0, 1, 1]), 1.7
    expected = 0.0
    for z, t, y in zip(student, teacher, target.tolist(), strict=True):
        p, q = (t / 2).softmax(0).tolist(), (z / 2).softmax(0).log().tolist()
        for c in range(3):
            m = float(c == y)
            expected -= ((p[c] + m) ** exponent - m) * q[c] / 4
    value = loss(student, teacher, target, exponent=exponent, temperature=2.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_mixed_targets_count_as_their_largest_class() -> None:
    mixed = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    assert loss(target=mixed, exponent=1.5).item() == loss(exponent=1.5).item()


def test_gradcheck_and_a_constant_teacher() -> None:
    student, teacher = random_logits(2, 3, 4).unbind()
    student.requires_grad_(), teacher.requires_grad_()
    target = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(
        lambda z: loss(z, teacher.detach(), target, exponent=1.5), student
    )
    loss(student, teacher, target).backward()
    assert teacher.grad is None


# -- the method ------------------------------------------------------------------------------------


def images(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, 32, 32, generator=generator)
    return Batch(inputs, torch.arange(count) % 10, torch.arange(count))


def tiny_timm(name: str, **options) -> nn.Module:
    return timm_model(name=name, num_classes=10, image_size=32, options=options)


TOKENS = {"num_classes": 10, "img_size": 32, "patch_size": 4, "num_blocks": 4, "embed_dim": 16}

STUDENTS = {
    "cnn": lambda: SmallCNN(num_classes=10, widths=(4, 8, 8, 16)),
    "vit": lambda: tiny_timm(
        "vit_tiny_patch16_224", patch_size=4, embed_dim=16, depth=4, num_heads=2
    ),
    "deit": lambda: tiny_timm(
        "deit_tiny_distilled_patch16_224", patch_size=4, embed_dim=16, depth=4, num_heads=2
    ),
    "mixer": lambda: MlpMixer(**TOKENS),
    "swin": lambda: tiny_timm(
        "swin_tiny_patch4_window7_224",
        patch_size=1,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        window_size=4,
    ),
    "resmlp": lambda: MlpMixer(**TOKENS, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4),
}


@pytest.mark.parametrize("family", STUDENTS)
def test_students_of_every_family_learn_from_another(family: str) -> None:
    torch.manual_seed(0)
    student = STUDENTS[family]()
    teacher = STUDENTS["mixer" if family == "cnn" else "cnn"]()
    batch = images()
    session = start(OFA(final_grid=4, exponent=1.5), student, teacher, batch)
    terms = session.terms(batch, NOW)
    exits = {"exit1", "exit2", "exit3", "exit4"}
    assert set(terms) == {"supervised", "distillation"} | exits
    sum(terms.values()).backward()
    for name, parameter in [*session.method.named_parameters(), *student.named_parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    session.student.taps.remove()
    student.eval()
    with torch.no_grad():
        for name, network in session.method.eval().companions(student).items():
            logits = network(batch.inputs)
            assert logits.shape == (4, 10), name


def test_exits_of_companions_are_those_that_were_trained() -> None:
    torch.manual_seed(0)
    student, batch = STUDENTS["mixer"](), images()
    session = start(OFA(final_grid=4), student, STUDENTS["cnn"](), batch)
    student.eval(), session.method.eval()
    with torch.no_grad():
        terms = session.terms(batch, NOW)
        teacher = session.others["teacher"](batch).logits
        for name, network in session.method.companions(student).items():
            expected = loss(network(batch.inputs), teacher, batch.target)
            torch.testing.assert_close(terms[name], expected)


def test_the_widest_classifier_decides_the_width_for_maps_but_not_for_tokens() -> None:
    def widths(student: str, teacher_width: int) -> list[int]:
        teacher = SmallCNN(num_classes=10, widths=(4, 8, 8, teacher_width))
        session = start(OFA(final_grid=4), STUDENTS[student](), teacher, images(2))
        heads = [list(branch.modules())[-1] for branch in session.method.exits.values()]
        return [head.in_features for head in heads]

    assert widths("cnn", 8) == [16] * 4 and widths("cnn", 24) == [24] * 4
    assert widths("mixer", 8) == widths("mixer", 24) == [16] * 4


def test_some_stages_or_none(data, teacher, student) -> None:
    few = data.rows(slice(8))
    for stages, names in (([1, 3], {"exit1", "exit3"}), ([], set())):
        terms = start(OFA(stages=stages), student, teacher, few).terms(few, NOW)
        assert set(terms) == {"supervised", "distillation"} | names
    with pytest.raises(ValueError, match=r"stages=\[4\]: the student has the stages \[1, 2, 3\]"):
        start(OFA(stages=[4]), student, teacher, few)


def test_an_exponent_for_each_term(data, teacher, student) -> None:
    few = data.rows(slice(8))
    one, each = (
        start(OFA(stages=[2], exponent=exponent), student, teacher, few)
        for exponent in (1.5, [1.5, 1.0])
    )
    each.method.load_state_dict(one.method.state_dict())
    for session in (one, each):
        session.method.eval(), session.student.network.eval()
    first, second = (session.terms(few, NOW) for session in (one, each))
    assert first["exit2"].item() == second["exit2"].item()
    assert first["distillation"].item() != second["distillation"].item()
    with pytest.raises(ValueError, match="2 exponents for 3 exits and the final logits"):
        start(OFA(exponent=[1.0, 1.0]), student, teacher, few)


def test_the_papers_variant_holds_the_labels_itself(data, teacher, student) -> None:
    few = data.rows(slice(8))
    method = OFA(variant="paper")
    terms = start(method, student, teacher, few).terms(few, NOW)
    assert "supervised" not in terms and set(method.weights(NOW)) == set(terms)


def test_a_student_without_image_features(teacher) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    few = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.arange(2))
    with pytest.raises(ValueError, match="Sequential has neither"):
        start(OFA(), student, teacher, few)


def test_the_teacher_does_not_move(data, teacher) -> None:
    few = data.rows(slice(16))
    student = ConvNet(width=4)
    session = start(OFA(), student, teacher, few)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(session.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        session.total(few, NOW).backward()
        optimizer.step()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_training_brings_exits_and_student_to_the_teacher(data, teacher, student) -> None:
    method = OFA(exponent=1.2)
    history = train(method, student, teacher, data, epochs=4)
    for term in ("exit1", "exit2", "exit3", "distillation"):
        assert history[-1][term] < 0.6 * history[0][term], term
    assert agreement(student, teacher, data.inputs) > 0.85
    for name, network in method.eval().companions(student).items():
        assert agreement(network, teacher, data.inputs) > 0.6, name


def test_exits_vanish_from_the_deployed_student(data, teacher) -> None:
    student = ConvNet(width=4)
    names = set(student.state_dict())
    method = start(OFA(), student, teacher, data.rows(slice(8))).method
    assert set(method.deploy(student).state_dict()) == names


# -- stages of the papers' networks ----------------------------------------------------------------

STAGES = {
    "resnet18": [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],
    "mobilenetv2_100": [(24, 56, 56), (32, 28, 28), (96, 14, 14), (1280, 7, 7)],
    "convnext_tiny": [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)],
    "deit_tiny_patch16_224": [(197, 192)] * 4,
    "mixer_b16_224": [(196, 768)] * 4,
    "resmlp_12_224": [(196, 384)] * 4,
    "swin_tiny_patch4_window7_224": [(3136, 96), (784, 192), (196, 384), (49, 768)],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_the_papers_networks(name: str) -> None:
    """Shapes are found without numbers; the exits are those for maps or for tokens."""
    with torch.device("meta"):
        student = timm_model(name=name, num_classes=100, image_size=224)
        teacher = SmallCNN(num_classes=100, widths=(4, 8, 8, 640))
        zeros = torch.zeros(2, 3, 224, 224)
        batch = Batch(zeros, torch.zeros(2, dtype=torch.long), torch.arange(2))
        session = start(OFA(), student, teacher, batch)
        output, _ = session.forward(batch)
    method = session.method
    features = [method._formed(feature) for feature in output.features.values()]
    assert [tuple(feature.shape[1:]) for feature in features] == STAGES[name]
    kind = "Sequential" if features[0].ndim == 4 else "TokenExit"
    assert {type(branch).__name__ for branch in method.exits.values()} == {kind}
