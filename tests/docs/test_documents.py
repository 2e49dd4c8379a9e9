"""Every command in the README and in docs/ is run (``tests/docs/blocks.py`` says how)."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from kdrun import cli
from kdrun.catalogue import open_catalogue
from kdrun.config import compose
from kdrun.sweep_plan import check
from tests.docs.blocks import DOCUMENTS, ROOT, Block, Command, blocks, shortened

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
COMMAND_BLOCKS = [block for block in BLOCKS if block.commands]

LARGEST_SECONDS = 600
ELISION = "..."


def environment() -> dict[str, str]:
    """The tested kdrun first on the path, one thread, and no access to the hub."""
    changed = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "KDRUN_DATA"}
    return kept | changed


def run(command: Command, block: Block, folder: Path) -> str:
    """Run a command of a block in ``folder``; returns what it printed."""
    text = shortened(command, block.argument) if block.kind == "add" else command.text
    # scripts/run is kdrun after the installation, which whoever runs the tests has done.
    text = re.sub(r"^scripts/run\b", "kdrun", text)
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LARGEST_SECONDS,
    )
    expected = 2 if block.kind == "fails" else 0
    assert done.returncode == expected, f"{block}: {text}\n{done.stdout}"
    return done.stdout


def assert_same_text(shown: str, printed: str) -> None:
    """The document shows what was printed; ``...`` stands for any lines, or any part of one."""
    pattern = "".join(
        r"(?:.*\n)*?"
        if line.strip() == ELISION
        else ".*".join(map(re.escape, line.rstrip().split(ELISION))) + "\n"
        for line in shown.rstrip().splitlines()
    )
    printed = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())
    assert re.fullmatch(pattern, printed), f"shown:\n{shown}\nprinted:\n{printed}"


def assert_same_shape(shown: str, printed: str) -> None:
    """Every line shown was printed, in that order, whatever its numbers: they depend on the
    machine, and on how the command was shortened."""
    rest = iter(map(masked, printed.splitlines()))
    for line in shown.splitlines():
        if line.strip() and line.strip() != ELISION:
            pattern = ".*".join(map(re.escape, masked(line).split(ELISION)))
            found = any(re.fullmatch(pattern, other) for other in rest)
            assert found, f"not printed: {line}\nprinted:\n{printed}"


def masked(line: str) -> str:
    """A line with its fingerprints, numbers and times replaced, and single spaces."""
    line = re.sub(r"\b[0-9a-f]{8}\b|(?<![A-Za-z_\d])\d[\d.,:]*( s\b)?", "#", line)
    return " ".join(line.split())


def slow_if_it_trains(block: Block) -> ParameterSet:
    return pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.trains else [])


@pytest.mark.parametrize("block", list(map(slow_if_it_trains, COMMAND_BLOCKS)))
def test_commands(block: Block, tmp_path: Path) -> None:
    if block.kind == "skip":
        assert block.argument, f"{block} is skipped without a reason"
        pytest.skip(block.argument)
    if block.kind == "compose":
        for command in block.commands:
            assert_composes(command)
        return
    for other in blocks(block.document):
        if other.kind == "file":
            path = tmp_path / other.argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(other.text, encoding="utf-8")
    for command in block.commands:
        printed = run(command, block, tmp_path)
        if command.output and block.trains:
            assert_same_shape(command.output, printed)
        elif command.output:
            assert_same_text(command.output, printed)


def assert_composes(command: Command) -> None:
    """The command's config is found without fault; an extra that is not installed is none."""
    words = command.words
    assert words, f"{command.text}: no kdrun command"
    if words[0] == "-m":
        faults = check(words[1:], open_catalogue())
        assert [fault for fault in faults if "is not installed" not in fault] == []
    else:
        compose(words, open_catalogue())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_command_hides_from_the_tests(document: Path) -> None:
    for block in blocks(document):
        if not block.commands:
            hidden = [
                line for line in block.text.splitlines() if re.match(r"(\$ |kdrun |scripts/)", line)
            ]
            assert not hidden, f"{block} is neither console nor bash"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_in_running_text(
    document: Path, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        words = shlex.split(span)
        is_command = words[0] == "kdrun"
        words = words[1:] if is_command else words
        is_run = all(re.match(r"[\w.]+=.", word) for word in words if word != "-m")
        if is_command and len(words) == 1 and words[0] in cli.VERBS:
            continue  # the name of a command
        if any(ELISION in word or word.isupper() or "<" in word for word in words):
            continue  # something is left for the reader to fill in
        if words and is_run:
            overrides = [word for word in words if word != "-m"]
            if document.parent.name == "systems" and "method=" not in span:
                overrides = [f"method={document.stem}", *overrides]  # what the page is about
            assert check(overrides, open_catalogue()) == [], span
        elif is_command:
            # A table is a plan here, not days of training.
            words += ["--dry-run"] if words[:1] == ["table"] else []
            assert cli.run(words) == 0, f"{span}: {capsys.readouterr().err}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_has_its_commands() -> None:
    found = [c.text for b in COMMAND_BLOCKS if b.document.name == "README.md" for c in b.commands]
    assert any("method=sinkhorn student=resnet18" in text for text in found)
    assert "scripts/test" in found


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = [name for name, verb in cli.VERBS.items() if verb.summary]
    assert [name for name in verbs if f"`kdrun {name}" not in text] == []


def test_the_table_of_methods_is_up_to_date(capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    document = importlib.import_module("document")
    assert document.main(["--check"]) == 0, capsys.readouterr().err
