"""What holds for every method there is: each file in ``conf/method`` is put through all of this."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from torch import Tensor, nn

from kdrun.build import instantiate, resolve
from kdrun.method import Method
from kdrun.models.language import hf_lm
from kdrun.outputs import Batch, ModelOutput, Progress, next_token_batch
from kdrun.parameters import Interval, complaint
from kdrun.tasks.language_modelling import LanguageModelling
from tests.methods.training import ConvNet, Session, digits, start, weighted_sum

CONFIGS = sorted(Path(__file__).parents[1].joinpath("conf", "method").glob("*.yaml"))
NODES = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS}
CLASSES: dict[str, type[Method]] = {name: resolve(node["_target_"]) for name, node in NODES.items()}
SAMPLES = 16
NOW = Progress(epoch=1, epochs=3, step=2, steps=6)


# -- tiny networks and data of each task ---------------------------------------------------------


class Case(typing.NamedTuple):
    batch: Batch
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    supervised_loss: Callable[[ModelOutput, Batch], Tensor] | None = None


def text_case() -> Case:
    """Rows of seven tokens, of which as many count in each row, but not the same ones."""
    words, length = 11, 7
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(words, (SAMPLES, length + 1), generator=generator)
    counted = torch.ones(SAMPLES, length + 1, dtype=torch.bool)
    counted[::2, :3] = False
    counted[1::2, -2:] = False

    def llama(width: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
        options = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
        return hf_lm(num_classes=words, input_shape=[length], options=options | sizes)

    return Case(
        next_token_batch(tokens, counted, torch.arange(SAMPLES)),
        lambda: llama(8),
        lambda: llama(16),
        LanguageModelling(num_classes=words).supervised_loss,
    )


TASKS: dict[str, Callable[[], Case]] = {
    "classification": lambda: Case(
        digits(SAMPLES), lambda: ConvNet(width=4), lambda: ConvNet(width=6)
    ),
    "language_modelling": text_case,
}


class OnNodes(ConvNet):
    """A network that reads the pictures on the nodes of a graph, not its edges."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().forward(inputs["image"])


def graph_case() -> Case:
    """Pictures on the nodes of a ring."""
    pictures = digits(SAMPLES)
    nodes = torch.arange(SAMPLES)
    there = torch.stack([nodes, nodes.roll(1)])
    pictures.inputs = {
        "image": pictures.inputs,
        "edge_index": torch.cat([there, there.flip(0)], dim=1),
    }
    return Case(pictures, lambda: OnNodes(width=4), lambda: OnNodes(width=6))


each_method = pytest.mark.parametrize("name", NODES)


def each_task_where(declared: Callable[[type[Method]], bool]) -> pytest.MarkDecorator:
    """Every method that declares something, with every task that it supports."""
    return pytest.mark.parametrize(
        ("name", "task"),
        [(name, task) for name, cls in CLASSES.items() for task in cls.tasks if declared(cls)],
    )


each_task = each_task_where(lambda cls: True)


def build(name: str, **changes: Any) -> Method:
    node = {key: value for key, value in NODES[name].items() if key != "defaults"}
    return instantiate(node | changes)


def case_of(name: str, task: str) -> Case:
    case = graph_case() if "edge_index" in CLASSES[name].needs else TASKS[task]()
    generator = torch.Generator().manual_seed(3)
    for view in CLASSES[name].views:
        noise = torch.randn(case.batch.inputs.shape, generator=generator)
        case.batch.views[view] = case.batch.inputs + 0.1 * noise
    if CLASSES[name].unlabelled:
        others = digits(2 * SAMPLES).rows(slice(SAMPLES, None))
        others.target = torch.full_like(others.target, -1)
        case.batch.unlabelled = others
    return case


def session_of(name: str, case: Case, *, equal: bool = False) -> Session:
    """A method at work on fresh networks, the same ones for the same arguments."""
    torch.manual_seed(0)
    teacher = with_statistics(case.teacher(), case.batch)
    student = copy.deepcopy(teacher) if equal else with_statistics(case.student(), case.batch)
    make_peer = (lambda: copy.deepcopy(student)) if equal else case.student
    session = start(build(name), student, teacher, case.batch, make_peer)
    if case.supervised_loss is not None:
        session.method.supervised_loss = case.supervised_loss
    return session


def with_statistics(network: nn.Module, batch: Batch) -> nn.Module:
    """Running statistics of batch norm as after some training, so that features are not tiny."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(batch.inputs)
    return network


def one_step(session: Session, batch: Batch, progress: Progress = NOW) -> dict[str, Tensor]:
    parameters = session.parameters()
    optimizer = torch.optim.SGD(parameters, 1e-4)
    terms = session.terms(batch, progress)
    weighted_sum(terms, session.method.weights(progress)).backward()
    optimizer.step()
    session.method.after_step(progress)
    return terms


def rows(batch: Batch, chosen: Tensor) -> Batch:
    views = {name: view[chosen] for name, view in batch.views.items()}
    mask = None if batch.mask is None else batch.mask[chosen]
    inputs = batch.inputs
    inputs = subgraph(inputs, chosen) if isinstance(inputs, dict) else inputs[chosen]
    chosen_rows = inputs, batch.target[chosen], batch.index[chosen]
    return Batch(*chosen_rows, mask, views, unlabelled=batch.unlabelled)


def subgraph(inputs: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """The nodes ``chosen``, in that order, and the edges between them."""
    number = torch.full((len(inputs["image"]),), -1)
    number[chosen] = torch.arange(len(chosen))
    edges = number[inputs["edge_index"]]
    return {"image": inputs["image"][chosen], "edge_index": edges[:, (edges >= 0).all(0)]}


def evaluation_mode(session: Session) -> None:
    """Put batch statistics, which tie samples together, out of play."""
    for network in (session.student, *session.others.values()):
        network.network.eval()
    session.method.eval()


# -- config, signature, documentation ------------------------------------------------------------


def test_every_method_is_found() -> None:
    files = Path(inspect.getfile(Method)).with_name("methods").glob("*.py")
    assert {path.stem for path in files} - {"__init__"} == set(NODES)


@each_method
def test_yaml_is_the_signature(name: str) -> None:
    node, cls = NODES[name], CLASSES[name]
    assert node["_target_"] == f"kdrun.methods.{name}.{cls.__name__}"
    parameters = dict(inspect.signature(cls.__init__).parameters)
    parameters.pop("self")
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    given = {key: value for key, value in node.items() if key not in ("_target_", "defaults")}
    assert given == {key: p.default for key, p in parameters.items()}


@each_method
def test_documentation_names_the_paper_and_every_option(name: str) -> None:
    cls = CLASSES[name]
    title = inspect.getdoc(sys.modules[cls.__module__]).splitlines()[0]
    assert re.search(r"\(.+\b(19|20)\d\d\)\.$", title), f"paper, venue, year missing: {title}"
    for parameter in inspect.signature(cls.__init__).parameters:
        if parameter != "self":
            assert re.search(rf"^\s+{parameter}: ", cls.__doc__, re.MULTILINE), parameter


def bad_values(annotation: Any) -> list[Any]:
    """Values that an annotation of the vocabulary does not admit."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, interval = get_args(annotation)
        assert isinstance(interval, Interval)
        bad = [interval.low - 1, *([interval.low] if interval.low_open else [])]
        bad += [interval.high + 1, *([interval.high] if interval.high_open else [])]
        finite = [base(value) for value in bad if abs(value) != float("inf")]
        return ["text", *finite, *([1.5] if base is int else [])]
    if origin is Literal:
        return ["no-such-choice"]
    candidates = ["text", -1, 0.5, object()]
    return [value for value in candidates if complaint(value, annotation)]


@each_method
def test_values_out_of_range_are_refused(name: str) -> None:
    cls = CLASSES[name]
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    for parameter in inspect.signature(cls.__init__).parameters:
        if parameter == "self":
            continue
        options = get_args(hints[parameter]) if type(None) in get_args(hints[parameter]) else ()
        options = options or (hints[parameter],)
        bad = [v for option in options if option is not type(None) for v in bad_values(option)]
        bad = [value for value in bad if complaint(value, hints[parameter])]
        assert bad, f"{parameter} takes anything; give it a type or a range"
        for value in bad:
            with pytest.raises(ValueError, match=f"{cls.__name__}: {parameter} must be"):
                cls(**{parameter: value})


@each_method
def test_methods_know_nothing_of_the_engine(name: str) -> None:
    allowed = {
        "kdrun.losses",
        "kdrun.layers",
        "kdrun.selection",
        "kdrun.outputs",
        "kdrun.method",
        "kdrun.parameters",
    }
    allowed |= {"kdrun.methods"}
    tree = ast.parse(Path(inspect.getfile(CLASSES[name])).read_text())
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.startswith("kdrun."):
                assert ".".join(module.split(".")[:2]) in allowed, module
            assert module.split(".")[0] not in ("lightning", "hydra", "omegaconf"), module


# -- a step --------------------------------------------------------------------------------------


@each_task
def test_a_step_trains_exactly_what_it_should(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    frozen = [
        network.network
        for role, network in session.others.items()
        if role not in session.method.trainable_roles
    ]
    before = copy.deepcopy([network.state_dict() for network in frozen])
    terms = one_step(session, case.batch)
    for term, value in terms.items():
        assert value.shape == (), term
        assert torch.isfinite(value), term
    trained = {
        "student": session.student.network,
        "method": session.method,
        **{role: session.others[role].network for role in session.method.trainable_roles},
    }
    for role, module in trained.items():
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"no gradient reaches {role}.{path}"
                assert torch.isfinite(parameter.grad).all(), f"{role}.{path}"
    one_step(session, case.batch)
    for network, state in zip(frozen, before, strict=True):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        for key, value in network.state_dict().items():
            assert torch.equal(value, state[key]), f"the step changed {key} of a frozen network"


@each_task_where(lambda cls: not cls.offline)
def test_every_term_but_the_supervised_needs_the_teacher(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    outputs, others = session.forward(case.batch)
    torch.manual_seed(1)
    terms = session.method.losses(outputs, others, case.batch, NOW)
    changed = {
        role: ModelOutput(
            output.logits.flip(0),
            {key: value.flip(0) for key, value in output.features.items()},
            output.extra,
            {view: ModelOutput(o.logits.flip(0), o.features) for view, o in output.views.items()},
            output.unlabelled,
        )
        for role, output in others.items()
    }
    torch.manual_seed(1)
    without = session.method.losses(outputs, changed, case.batch, NOW)
    distillation = [term for term in terms if term != "supervised"]
    assert distillation
    assert any(not torch.equal(terms[term], without[term]) for term in distillation)
    assert set(session.method.weights(NOW)) <= set(terms)
    assert all(weight >= 0 for weight in session.method.weights(NOW).values())


@each_task
def test_the_deployed_student_stands_alone(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    one_step(session, case.batch)
    deployed = session.method.deploy(session.student.network).eval()
    session.student.taps.remove()
    output = deployed(case.batch.inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    assert logits.shape[0] == SAMPLES
    assert torch.isfinite(logits).all()
    helpers = {id(p) for p in session.method.parameters()}
    if type(session.method).deploy is Method.deploy:
        assert not helpers & {id(p) for p in deployed.parameters()}


@each_task_where(lambda cls: not (cls.relational or cls.ordered))
def test_splitting_the_batch_does_not_change_the_loss(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    one_step(session, case.batch)
    evaluation_mode(session)
    whole = session.total(case.batch, NOW)
    parts = [
        session.total(rows(case.batch, chosen), NOW) for chosen in torch.arange(SAMPLES).split(4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-4, atol=1e-5)


@each_task_where(lambda cls: not cls.ordered)
def test_the_order_of_the_batch_does_not_matter(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    one_step(session, case.batch)
    evaluation_mode(session)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        session.total(rows(case.batch, order), NOW),
        session.total(case.batch, NOW),
        rtol=1e-4,
        atol=1e-5,
    )


@each_task
def test_half_precision_is_finite_and_near(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    evaluation_mode(session)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = session.terms(case.batch, NOW)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = session.terms(case.batch, NOW)
    weighted_sum(terms, session.method.weights(NOW)).backward()
    for term, value in terms.items():
        assert value.dtype == torch.float32, f"{term} is computed in {value.dtype}"
        assert torch.isfinite(value), term
        assert value.item() == pytest.approx(expected[term].item(), rel=0.2, abs=0.02), term
    gradients = [p.grad for p in session.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


REFUSED_ON_CUDA = re.compile(
    r"(Adaptive(Avg|Max)Pool|AvgPool3D|FractionalMaxPool|MaxUnpool|ReflectionPad|NllLoss2D|CtcLoss"
    r"|Upsample(Linear|Bilinear|Bicubic|Trilinear)|GridSampler|Median|Put)"
)
"""Gradients that PyTorch cannot repeat bit for bit on CUDA (``use_deterministic_algorithms``)."""


@each_task
def test_the_gradient_can_be_repeated_on_cuda(name: str, task: str) -> None:
    case = case_of(name, task)
    total = session_of(name, case).total(case.batch, NOW)
    waiting, seen = [total.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        assert not REFUSED_ON_CUDA.match(node.name()), f"{node.name()} in the graph"
        waiting += [following for following, _ in node.next_functions]
    assert len(seen) > 20


@each_task
def test_saved_state_continues_identically(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    for _ in range(2):
        one_step(session, case.batch)
    torch.manual_seed(7)
    again = session_of(name, case)
    modules = [(session.method, again.method), (session.student.network, again.student.network)]
    modules += [
        (session.others[role].network, again.others[role].network)
        for role in session.method.trainable_roles
    ]
    for saved, fresh in modules:
        fresh.load_state_dict(saved.state_dict())
    later = Progress(epoch=2, epochs=3, step=4, steps=6)
    torch.manual_seed(9)
    expected = session.terms(case.batch, later)
    torch.manual_seed(9)
    actual = again.terms(case.batch, later)
    assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}


@each_task_where(lambda cls: cls.zero_at_equality)
def test_agreement_costs_nothing_where_declared(name: str, task: str) -> None:
    case = case_of(name, task)
    terms = {}
    for equal in (True, False):
        session = session_of(name, case, equal=equal)
        evaluation_mode(session)
        terms[equal] = session.terms(case.batch, NOW)
    for term, value in terms[True].items():
        if not term.startswith("supervised"):
            # Guards against division by zero leave a trace.
            assert abs(value) < 0.01 * abs(terms[False][term]), term


# Networks that learn from each other hold each other's predictions constant: what is minimised is
# then not a single function.
@each_task_where(lambda cls: not (cls.trainable_roles or cls.detached))
def test_the_gradient_is_that_of_finite_differences(name: str, task: str) -> None:
    case = case_of(name, task)
    session = session_of(name, case)
    one_step(session, case.batch)
    evaluation_mode(session)
    for module in (session.method, session.student, *session.others.values()):
        (module if isinstance(module, Method) else module.network).double()
    batch = rows(case.batch, torch.arange(3))
    if isinstance(batch.inputs, dict):
        batch.inputs["image"] = batch.inputs["image"].double()
    elif batch.inputs.is_floating_point():
        batch.inputs = batch.inputs.double()
    batch.views = {view: inputs.double() for view, inputs in batch.views.items()}
    if batch.unlabelled is not None:
        batch.unlabelled = replace(batch.unlabelled, inputs=batch.unlabelled.inputs.double())
    with torch.no_grad():
        student, others = session.forward(batch)
    names = list(student.features)
    views = list(student.views)
    leaves = [student.logits, *student.features.values(), *(student.views[v].logits for v in views)]
    # Off the kinks: a channel that a ReLU has switched off sits exactly on one.
    noise = torch.Generator().manual_seed(0)
    leaves = [
        (leaf + 0.05 * torch.randn(leaf.shape, generator=noise)).detach().requires_grad_()
        for leaf in leaves
    ]

    def total(*values: Tensor) -> Tensor:
        logits, *features = values[: 1 + len(names)]
        seen = {
            view: ModelOutput(value, student.views[view].features)
            for view, value in zip(views, values[1 + len(names) :], strict=True)
        }
        tapped = dict(zip(names, features, strict=True))
        output = ModelOutput(logits, tapped, {}, seen, student.unlabelled)
        torch.manual_seed(0)
        terms = session.method.losses(output, others, batch, NOW)
        return weighted_sum(terms, session.method.weights(NOW))

    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)
