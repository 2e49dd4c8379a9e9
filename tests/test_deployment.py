"""Testing a finished student again, and writing it for other programs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdrun import cli, deployment
from kdrun import export as export_module
from kdrun.catalogue import open_catalogue
from kdrun.deployment import evaluate_run, export_run, load_student, read_request
from kdrun.errors import UserError
from kdrun.export import export
from kdrun.models.small_cnn import SmallCNN
from kdrun.outputs import Batch
from kdrun.runs import resume_config
from kdrun.tasks.classification import Classification
from tests.tiny import digits, identical, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    return run(tmp_path_factory.mktemp("outputs"), "training.epochs=2")


@pytest.fixture
def inputs() -> torch.Tensor:
    return next(iter(digits().test(batch_size=7, device="cpu"))).inputs


def plain_student(path: Path) -> nn.Module:
    network = SmallCNN(num_classes=10, in_channels=1)
    network.load_state_dict(load_file(path))
    return network.eval()


# -- eval ------------------------------------------------------------------------------------------


def test_eval_repeats_the_result_of_the_run(finished, capsys) -> None:
    result, directory = finished
    evaluate_run(directory, [], open_catalogue())
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "digits, 500 test samples"
    assert told[-1] == str(directory / "eval-digits.json")
    written = json.loads((directory / "eval-digits.json").read_text())
    assert written["samples"] == 500 and written["data"] == result["data"]
    for role, entry in result["networks"].items():
        for key in entry.keys() & {"test", "test_last", "test_best"}:
            assert written["networks"][role][key] == entry[key]


def test_eval_of_a_run_that_was_moved(finished, tmp_path: Path, capsys) -> None:
    """Away from its store there is only the student; what is missing is told."""
    result, directory = finished
    moved = tmp_path / "some" / "deep" / "place" / "seed0"
    shutil.copytree(directory, moved)
    evaluate_run(moved, [], open_catalogue())
    networks = json.loads((moved / "eval-digits.json").read_text())["networks"]
    assert set(networks) == {"distilled"}
    told = capsys.readouterr().out.splitlines()
    for role in ("teacher", "alone"):
        assert f"{role} is left out: the store no longer has it" in told
    expected = result["networks"]["distilled"]["test_last"]
    assert networks["distilled"]["test_last"] == {
        name: value for name, value in expected.items() if name not in ("kl", "agreement")
    }


def test_a_run_too_near_the_root_has_no_store() -> None:
    run = deployment.FinishedRun(Path("/seed0"), {}, {"artefacts": {"teacher": "network/0"}})
    assert run.artefacts() == {}
    with pytest.raises(UserError, match="was moved; put it back"):
        resume_config(Path("/seed0"), [], open_catalogue())


def test_eval_on_another_test_set(finished, capsys) -> None:
    """The digits drawn larger: the CNN reads them, and is wrong more often; the MLP cannot."""
    result, directory = finished
    evaluate_run(directory, ["dataset.image_size=12"], open_catalogue())
    assert "teacher is left out: " in capsys.readouterr().out
    (path,) = directory.glob("eval-digits-*.json")
    written = json.loads(path.read_text())
    assert set(written["networks"]) == {"alone", "distilled"}
    assert written["options"]["image_size"] == 12
    last = written["networks"]["distilled"]["test_last"]
    assert 0 < last["accuracy"] < result["networks"]["distilled"]["test_last"]["accuracy"]


def test_eval_on_inputs_that_the_student_cannot_read(tmp_path: Path) -> None:
    _, directory = run(tmp_path, "student=mlp")
    with pytest.raises(UserError, match=r"digits has inputs of 1x12x12, but .*MLP"):
        evaluate_run(directory, ["dataset.image_size=12"], open_catalogue())


def test_eval_of_other_classes_is_one_line(finished) -> None:
    _, directory = finished
    with pytest.raises(UserError, match=r"tabular has 3 classes, but .* was trained on 10") as told:
        evaluate_run(directory, ["dataset=tabular"], open_catalogue())
    assert "\n" not in str(told.value)
    assert not list(directory.glob("eval-tabular*"))


def test_eval_takes_data_and_trainer_only(finished) -> None:
    with pytest.raises(UserError, match=r"method=dkd: eval takes options of dataset and trainer"):
        evaluate_run(finished[1], ["method=dkd"], open_catalogue())


def test_an_unfinished_run_says_how_to_go_on(finished, tmp_path: Path) -> None:
    shutil.copy(finished[1] / "config.yaml", tmp_path)
    for verb in (
        lambda: evaluate_run(tmp_path, [], open_catalogue()),
        lambda: export_run(tmp_path, []),
        lambda: load_student(tmp_path),
    ):
        with pytest.raises(
            UserError, match=f"not finished; continue it with: kdrun resume {tmp_path}"
        ):
            verb()


def test_the_commands(finished, tmp_path: Path, capsys) -> None:
    directory = str(finished[1])
    assert cli.run(["eval", directory]) == 0
    assert cli.run(["export", directory, str(tmp_path / "x.safetensors")]) == 0
    assert capsys.readouterr().out
    assert cli.run(["eval", directory, "dataset=tabular"]) == 2
    assert cli.run(["export", directory, "format=onxx"]) == 2
    assert "Did you mean onnx?" in capsys.readouterr().err


# -- methods that change the student ---------------------------------------------------------------


@pytest.mark.slow
def test_a_student_that_its_method_rebuilt(tmp_path: Path, inputs, capsys) -> None:
    """SimKD ships a projector and the teacher's classifier inside the student."""
    words = ("method=simkd", "student=small_cnn", "teacher=small_cnn", "student.widths=[4,8,8]")
    result, directory = run(tmp_path, *words)
    network = load_student(directory)
    assert set(network.state_dict()) == set(load_file(directory / "student.safetensors"))
    evaluate_run(directory, [], open_catalogue())
    written = json.loads((directory / "eval-digits.json").read_text())
    before = result["networks"]["distilled"]["test_last"]
    assert written["networks"]["distilled"]["test_last"] == before
    export_run(directory, ["format=torch_export"])
    program = torch.export.load(directory / "student.pt2").module()
    torch.testing.assert_close(program(inputs), network(inputs))


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", ["last", "best"])
def test_load_student(finished, inputs, epoch) -> None:
    ending = {"last": "", "best": "_best"}[epoch]
    network = load_student(finished[1], epoch)
    assert not network.training
    expected = plain_student(finished[1] / f"student{ending}.safetensors")
    assert torch.equal(network(inputs), expected(inputs))


@pytest.mark.parametrize("name", ["student.pt", "weights.safetensors", "deep/er/student.bin"])
def test_a_state_dict_loads_in_plain_pytorch(finished, tmp_path: Path, capsys, name: str) -> None:
    path = tmp_path / name
    export_run(finished[1], [str(path)])
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    assert identical(state, load_file(finished[1] / "student.safetensors"))
    told = capsys.readouterr().out
    assert f"{path}: the student (last weights)" in told
    assert "checked on 5 test samples: logits differ by 0 at most" in told


def test_a_file_that_cannot_be_written_is_one_line(finished, tmp_path: Path) -> None:
    in_the_way = tmp_path / f".student.{os.getpid()}.pt"
    in_the_way.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*student\.pt: Is a directory"):
        export_run(finished[1], [str(tmp_path / "student.pt")])
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_what_is_printed_runs(finished, capsys) -> None:
    """The lines that say how to load it are executed as they stand."""
    _, directory = finished
    for words in (["weights=best"], ["format=torch_export"]):
        export_run(directory, words)
        told = capsys.readouterr().out
        code = told.partition("\n\n")[2]
        names: dict = {"inputs": torch.zeros(3, 1, 8, 8)}
        exec(code, names)
        assert names["network"](names["inputs"]).shape == (3, 10)
    assert (directory / "student_best.pt").is_file() and (directory / "student.pt2").is_file()


def test_a_program_needs_nothing_of_kdrun(finished, tmp_path: Path, inputs) -> None:
    path = tmp_path / "student.pt2"
    export_run(finished[1], [str(path), "weights=best"])
    program = torch.export.load(path).module()
    expected = plain_student(finished[1] / "student_best.safetensors")
    for size in (1, 2, 7):
        torch.testing.assert_close(program(inputs[:size]), expected(inputs[:size]))


@pytest.mark.slow
def test_onnx(finished, tmp_path: Path, inputs, capsys) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "student.onnx"
    export_run(finished[1], [str(path)])
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {"inputs": inputs.numpy()})
    expected = plain_student(finished[1] / "student.safetensors")(inputs)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_is_one_line(finished, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        export_module.importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("onnx") else real(name, *rest),
    )
    with pytest.raises(
        UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'kdrun\["
    ):
        export_run(finished[1], ["format=onnx"])
    assert not list(finished[1].glob("*.onnx"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=onxx"], "no such format. Did you mean onnx?"),
        (["weights=worst"], "no such weights"),
        (["fromat=onnx"], "export takes FILE, format= and weights="),
        (["a.pt", "b.pt"], "export writes one file"),
        (["student.exe"], r"must end in one of \.pt, "),
        (["student.pt", "format=onnx"], r"a file of format=onnx ends in \.onnx"),
    ],
)
def test_words_that_cannot_be_read(words, message) -> None:
    with pytest.raises(UserError, match=message):
        read_request(Path("run"), words)


def test_files_and_formats(tmp_path: Path) -> None:
    read = {
        (): ("state_dict", "run/student.pt", "last"),
        ("weights=best",): ("state_dict", "run/student_best.pt", "best"),
        ("format=onnx",): ("onnx", "run/student.onnx", "last"),
        ("x.pt2",): ("torch_export", "x.pt2", "last"),
        ("x.safetensors", "format=state_dict"): ("state_dict", "x.safetensors", "last"),
    }
    for words, expected in read.items():
        request = read_request(Path("run"), words)
        assert (request.format, str(request.path), request.epoch) == expected
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_request(Path("run"), [str(tmp_path / "folder.pt")])


class Unstable(nn.Module):
    """Gives something else each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape[0], 10)


class Untraceable(nn.Module):
    """Looks at the numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, : 10 if float(x.sum()) > 0 else 5]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Unstable(), "Unstable gives other logits once exported"),
        (Untraceable(), "Untraceable cannot be traced by torch.export: "),
    ],
)
def test_a_network_that_cannot_be_exported_leaves_no_file(tmp_path, inputs, network, message):
    batch = Batch(inputs, torch.zeros(7, dtype=torch.long), torch.arange(7))
    with pytest.raises(UserError, match=message):
        export(network, Classification(num_classes=10), batch, "torch_export", tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_more_than_logits(tmp_path: Path, inputs) -> None:
    class WithLogits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = SmallCNN(num_classes=10, in_channels=1)

        def forward(self, x):
            from transformers.modeling_outputs import ImageClassifierOutput

            return ImageClassifierOutput(logits=self.network(x))

    network = WithLogits().eval()
    batch = Batch(inputs, torch.zeros(7, dtype=torch.long), torch.arange(7))
    path = tmp_path / "x.pt2"
    assert export(network, Classification(num_classes=10), batch, "torch_export", path) < 1e-6
    logits = torch.export.load(path).module()(inputs)
    torch.testing.assert_close(logits, network(inputs).logits)


def test_a_place_that_cannot_be_written(finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot make .*file: File exists"):
        export_run(finished[1], [str(tmp_path / "file" / "student.pt")])


def test_artefacts_found_beside_the_run(finished) -> None:
    found = deployment.read_run(finished[1]).artefacts()
    assert {"teacher", "alone"} <= set(found)
