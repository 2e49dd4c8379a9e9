"""Reading weights from files of every kind, and writing them."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from kdrun.checkpoints import load_weights, read_weights, save_weights
from kdrun.errors import UserError


class Network(nn.Module):
    """A convolution, a normalisation with counter, and a classifier."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, classes)


@pytest.fixture
def source() -> Network:
    torch.manual_seed(1)
    network = Network()
    network.bn.running_mean.normal_()
    return network


@pytest.fixture
def target() -> Network:
    torch.manual_seed(2)
    return Network()


def equal(first: nn.Module, second: nn.Module) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in first.state_dict().items())


def prefixed(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network.state_dict().items()}


# -- what loads -----------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_bare_state_dict(source, target, tmp_path: Path, suffix: str) -> None:
    torch.save(source.state_dict(), tmp_path / f"w{suffix}")
    report = load_weights(target, tmp_path / f"w{suffix}")
    assert report.is_complete
    assert len(report.loaded) == 9
    assert equal(source, target)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "student.", "network.", "networks.student.", "module.model._orig_mod."],
)
def test_prefixes_of_wrappers(source, target, tmp_path: Path, prefix: str) -> None:
    torch.save(prefixed(source, prefix), tmp_path / "w.pt")
    assert load_weights(target, tmp_path / "w.pt").is_complete
    assert equal(source, target)


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict"])
def test_a_training_checkpoint(source, target, tmp_path: Path, nest: str) -> None:
    content = {nest: source.state_dict(), "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth").is_complete
    assert equal(source, target)


def test_options_and_numpy_scalars_beside_the_weights(source, target, tmp_path: Path) -> None:
    content = {"model": source.state_dict(), "opt": argparse.Namespace(lr=0.05, names=["a"])}
    content |= {"best_acc": np.float64(71.5), "epoch": np.int64(240)}
    torch.save(content, tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth").is_complete


def test_a_lightning_checkpoint_of_student_and_teacher(source, target, tmp_path: Path) -> None:
    teacher = Network()
    state = prefixed(source, "student.") | prefixed(teacher, "teacher.")
    content = {"state_dict": state, "pytorch-lightning_version": "2.6.0", "callbacks": {}}
    torch.save(content | {"hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    assert load_weights(target, tmp_path / "last.ckpt").is_complete
    assert equal(source, target)


def test_a_network_with_a_module_of_that_name_keeps_it(tmp_path: Path) -> None:
    source, target = nn.Module(), nn.Module()
    source.module, target.module = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert equal(source, target)


def test_files_without_counters(source, target, tmp_path: Path) -> None:
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert load_weights(target, tmp_path / "old.pth").is_complete


def test_dtype_and_memory_of_the_network_stay(source, target, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(source).half().state_dict(), tmp_path / "w.pt")
    weight = target.fc.weight
    load_weights(target, tmp_path / "w.pt")
    assert target.fc.weight is weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, source.fc.weight, rtol=1e-3, atol=1e-3)


# -- what does not fit ----------------------------------------------------------------------------
def test_a_teacher_with_other_classes_is_refused_with_both_shapes(source, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = Network(classes=7)
    untouched = copy.deepcopy(target)
    with pytest.raises(UserError) as caught:
        load_weights(target, tmp_path / "w.pt")
    message = str(caught.value)
    assert "fc.weight (4, 3) in the file, (7, 3) in the network" in message
    assert "\n" not in message
    assert equal(target, untouched)


def test_missing_and_unexpected_tensors_are_named(source, target, tmp_path: Path) -> None:
    state = source.state_dict()
    state["head.weight"] = state.pop("fc.weight")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match="not in the file: fc.weight; .*network: head.weight"):
        load_weights(target, tmp_path / "w.pt")


def test_long_lists_are_cut(target, tmp_path: Path) -> None:
    torch.save({f"other.{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="and 17 more"):
        load_weights(target, tmp_path / "w.pt")


def test_partial_loading_reports_what_was_and_was_not_loaded(source, tmp_path: Path) -> None:
    state = source.state_dict() | {"aux.bias": torch.zeros(1)}
    del state["bn.weight"]
    torch.save(state, tmp_path / "w.pt")
    target = Network(classes=7)
    report = load_weights(target, tmp_path / "w.pt", partial=True)
    assert "conv.weight" in report.loaded
    assert report.missing == ("bn.weight",)
    assert report.unexpected == ("aux.bias",)
    assert report.mismatched == {"fc.weight": ((4, 3), (7, 3)), "fc.bias": ((4,), (7,))}
    assert torch.equal(target.conv.weight, source.conv.weight)
    text = str(report)
    assert text.startswith(f"6 of 9 tensors loaded from {tmp_path / 'w.pt'}; ")
    assert "not in the file: bn.weight" in text and "not in the network: aux.bias" in text


def test_partial_loading_of_nothing_is_an_error(tmp_path: Path, target) -> None:
    counter = {"bn.num_batches_tracked": torch.tensor(1)}
    torch.save({"encoder.weight": torch.zeros(2)} | counter, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no tensor fits Network; .*encoder.weight"):
        load_weights(target, tmp_path / "w.pt", partial=True)


# -- what is no weights file ----------------------------------------------------------------------
class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(target, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name, dump in {"zip.pt": torch.save, "raw.pt": _pickle_to}.items():
        dump({"epoch": 3, "x": Malicious(trap)}, tmp_path / name)
        with pytest.raises(UserError, match=r"mkdir.*would run its code.*state_dict\(\)") as caught:
            load_weights(target, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


def _pickle_to(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_a_whole_pickled_network_is_refused(source, target, tmp_path: Path) -> None:
    torch.save(source, tmp_path / "network.pt")
    with pytest.raises(UserError, match=r"Network.*save the bare weights instead"):
        load_weights(target, tmp_path / "network.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_damaged_files(source, target, tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(500)
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": noise}[damage])
    with pytest.raises(UserError, match=f"{path.name}: damaged") as caught:
        load_weights(target, path)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_one_line(source, target, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in range(1, len(whole) - 1, len(whole) // 25):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            load_weights(target, tmp_path / "cut.pt")


def test_a_missing_file_and_a_folder(target, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_weights(target, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "accuracy": 0.5}, "holds no weights; its entries are epoch, accuracy"),
        ([1, 2], "holds no weights but a list"),
        (torch.zeros(3), "holds no weights but a Tensor"),
    ],
)
def test_files_without_weights(target, tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        load_weights(target, tmp_path / "w.pt")


# -- writing --------------------------------------------------------------------------------------
def test_saved_weights_load_in_plain_pytorch_and_the_digest_is_the_files(
    source, target, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "w.safetensors"
    digest = save_weights(source, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    target.load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert equal(source, target)
    assert save_weights(target, tmp_path / "again.safetensors") == digest


def test_tied_sliced_and_channels_last_tensors(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            whole = torch.randn(4, 4)
            self.register_buffer("upper", whole[:2])
            self.register_buffer("lower", whole[2:])
            self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)

    source, target = Tied(), Tied()
    save_weights(source, tmp_path / "w.safetensors")
    assert load_weights(target, tmp_path / "w.safetensors").is_complete
    assert equal(source, target)
    assert target.second.weight is target.first.weight


def test_a_failed_write_keeps_the_old_file(source, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "w.safetensors"
    digest = save_weights(source, path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with torch.no_grad():
        source.fc.weight.zero_()
    with pytest.raises(UserError, match="No space left"):
        save_weights(source, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_state_that_is_no_tensor_is_not_lost_silently(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"step": 3}

        def set_extra_state(self, state: dict) -> None: ...

    with pytest.raises(ValueError, match="_extra_state of Extra is no tensor"):
        save_weights(Extra(1, 1), tmp_path / "w.safetensors")


def test_reading_does_not_change_the_file(source, tmp_path: Path) -> None:
    digest = save_weights(source, tmp_path / "w.safetensors")
    weights = read_weights(tmp_path / "w.safetensors")
    for value in weights.values():
        value.zero_()
    assert hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest() == digest
