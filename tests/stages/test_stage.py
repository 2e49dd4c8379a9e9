"""What a recipe is made of: shared products in the store, others in the run's directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrun.errors import UserError
from kdrun.experiment import stages_of
from kdrun.stages.specialise import CoTrain
from kdrun.stages.stage import Context, Stage
from tests.tiny import composed


class Count(Stage):
    """Writes how often it was run."""

    kind = "count"
    made = 0

    def key(self, context: Context) -> dict:
        return {"seed": context.config["seed"]}

    def produce(self, context: Context, name: str, directory: Path) -> None:
        type(self).made += 1
        (directory / f"{name}.txt").write_text(str(self.made))


class Shared(Count):
    shared = True


class Unwanted(Count):
    def wanted(self, context: Context) -> bool:
        return False


def test_a_shared_product_is_made_once_for_all_runs(make_context) -> None:
    first, second, other = make_context(), make_context("method=dkd"), make_context("seed=1")
    for context in (first, second, other):
        Shared().run(context, "numbers")
    paths = [each.artefacts["numbers"].path("numbers.txt") for each in (first, second, other)]
    assert [path.read_text() for path in paths] == ["1", "1", "2"]
    assert paths[0].parent.parent == first.store.root / "count"
    assert "numbers: found in the store (count/" in first.console.file.read_text()


def test_any_other_product_belongs_to_the_run(make_context) -> None:
    context = make_context()
    Count().run(context, "own")
    assert context.artefacts["own"].directory == context.run_directory
    assert (context.run_directory / "own.txt").exists()


def test_a_stage_that_is_not_wanted_leaves_nothing(make_context) -> None:
    context = make_context()
    Unwanted().run(context, "nothing")
    assert context.artefacts == {} and list(context.run_directory.iterdir()) == []


def test_the_default_recipe() -> None:
    stages = stages_of(composed().values)
    order = [name for name in stages if name in ("teacher", "alone", "distil", "evaluate")]
    assert order == ["teacher", "alone", "distil", "evaluate"]
    assert [stages[name].shared for name in order] == [True, True, False, False]


def test_arguments_are_held_against_their_annotations() -> None:
    with pytest.raises(ValueError, match="epochs must be integer >= 1, got 0"):
        CoTrain(epochs=0)
    with pytest.raises(TypeError):
        Count(rows=3)


class Broken(Count):
    error: Exception

    def produce(self, context: Context, name: str, directory: Path) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "batch_size"),
        (
            RuntimeError(
                "pool_backward_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'."
            ),
            r"^pool_backward_cuda gives other bits each time .* set trainer\.deterministic=false",
        ),
    ],
)
def test_what_a_device_cannot_do_is_one_line(make_context, error, told) -> None:
    stage = Broken()
    stage.error = error
    with pytest.raises(UserError, match=told):
        stage.run(make_context(), "broken")


def test_memory_that_no_machine_has_is_one_line(make_context) -> None:
    class Large(Count):
        def produce(self, context: Context, name: str, directory: Path) -> None:
            torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(UserError, match="memory of the device is not enough"):
        Large().run(make_context(), "large")


def test_other_errors_of_a_stage_are_left_alone(make_context) -> None:
    stage = Broken()
    stage.error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        stage.run(make_context(), "broken")
