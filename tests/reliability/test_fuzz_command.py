"""Whatever is typed, and whatever stands in a config file: a valid config, or lines that say why.

Nothing here imports torch, so thousands of inputs take seconds. Every input comes from a seeded
generator: a failure names its number and can be repeated.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from kdrun.catalogue import GROUPS, Catalogue, open_catalogue
from kdrun.cli import run as kdrun
from kdrun.config import Config, compose
from kdrun.errors import ConfigErrors, UserError

CATALOGUE = open_catalogue()


def paths_of(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += paths_of(value, f"{prefix}{key}.")
    return found


KEYS = [*GROUPS, *paths_of(compose([], CATALOGUE).values)]
STRANGE = (
    *("", " ", "\0", "\n", "\t", "\r\n", "\x1b[31m", "ünïcödé", "日本語", "🙂", "\u202e", "\ufeff"),
    *("'", '"', "`", "\\", "/", "//", "..", "../../etc/passwd", "~", "~root", "%s", "%n", "{0}"),
    *("${seed}", "${oc.env:HOME}", "${nope}", "${${seed}}", "${", "}", "[", "]", "(", ")", ","),
    *("$(id)", "`id`", ";id", "|id", "&&", "<", ">", "!", "#", "@", "^", "=", "==", ":", "::"),
    *("null", "None", "true", "yes", "on", "nan", "-inf", "inf", "1e400", "-1e400", "1e-400"),
    *("0x7f", "0b1", "1_000", "٣", "1,2", "[1,2", "[[[[[[]]]]]]", "{a:{b:{c:{d:1}}}}", "{a:1,a:2}"),
    *("range(1,3)", "choice(a,b)", "interval(0,1)", "glob(*)", "shuffle(1)", "sort(2,1)", "tag(a)"),
    *("int(1.5)", "float(x)", "str(1)", "json_str({})", "extend_list(1)", "???", "*", "**"),
    *("!!python/object/apply:os.system [id]", "{_target_: os.system}", "_target_", "__class__"),
    *("-1", "0", "1", "99999999999999999999999999", "-" + "9" * 400, "1" + "0" * 5000, "a" * 20000),
    *("0." + "0" * 3000 + "1", "[" * 60 + "]" * 60, "{a:" * 40 + "1" + "}" * 40, "x." * 300 + "x"),
)
PREFIXES = ("", "", "", "", "", "+", "++", "~", "-", "--", " ", "model@", "@", ".", "=")


def text(dice: random.Random) -> str:
    """A value: a strange one, a piece of one, a choice that exists, or any characters."""
    kind = dice.random()
    if kind < 0.5:
        return dice.choice(STRANGE)
    if kind < 0.65:
        return dice.choice(CATALOGUE.choices(dice.choice(GROUPS)))
    if kind < 0.8:
        return str(dice.choice([dice.randint(-10, 10), dice.uniform(-1e9, 1e9), dice.random()]))
    points = (dice.randrange(0x20, dice.choice([0x7F, 0x500, 0x1F700])) for _ in range(12))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def word(dice: random.Random) -> str:
    key = dice.choice(KEYS) if dice.random() < 0.8 else text(dice)
    if dice.random() < 0.3:
        place = dice.randrange(len(key) + 1)
        key = (
            key[:place]
            + dice.choice(["", ".", "_", "x", "é", key[place : place + 1] * 2])
            + key[place + 1 :]
        )
    equals = "=" if dice.random() < 0.95 else dice.choice(["", "==", ": "])
    return f"{dice.choice(PREFIXES)}{key}{equals}{text(dice)}"


def words_of(seed: int) -> list[str]:
    dice = random.Random(seed)
    words = [word(dice) for _ in range(dice.choice((1, 1, 1, 2, 3, 6)))]
    if dice.random() < 0.1:
        words += words  # Everything given twice.
    return words


def refusal(words: list[str], catalogue: Catalogue) -> list[str]:
    """The lines that refuse an input; none if it is accepted. Anything else raises."""
    try:
        assert isinstance(compose(words, catalogue), Config)
    except ConfigErrors as error:
        assert error.problems
        assert all(line.strip() and len(line.splitlines()) == 1 for line in error.problems)
        return error.problems
    return []


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)
def test_words(first: int) -> None:
    refused = 0
    for seed in range(1000 * first, 1000 * (first + 1)):
        try:
            refused += bool(refusal(words_of(seed), CATALOGUE))
        except Exception as error:
            raise AssertionError(f"input {seed}: {words_of(seed)!r:.2000}") from error
    assert 500 < refused < 1000, "both kinds of input are needed"


# -- config files ---------------------------------------------------------------------------------

FRAGMENTS = (
    *("_target_: kdrun.methods.kd.KD", "temperature: 4.0", "_target_: os.system", "a: &x [*x]"),
    *("defaults: [base]", "defaults: [nowhere]", "defaults: {a: b}", "defaults: 3", "- a", "- [b"),
    *("stages: null", "stages: [1]", "stages: {a: 1}", "<<: 1", "? a", "!!binary x", "%YAML 9.9"),
    *("_target_: [1]", "_target_: 3", "_target_: null", "_target_:", "1: 2", "null: 1", "a.b: 1"),
    *("temperature: ${seed}", "temperature: ${x.y}", "temperature: .nan", "temperature: [1, {}]"),
    *(
        "defaults: [override /training: smoke]",
        "defaults: [override /nope: x]",
        "{",
        "}",
        "\t",
        ": ",
    ),
    *("# @package _global_", "seed: -1", "hydra: {run: 1}", "epochs: 1e999", "\x00", "\ufeffa: 1"),
    *("temperature: !!python/object:os.system {}", "a: !!set {b}", "date: 2020-01-01", "é: ü"),
)


def config_text(dice: random.Random) -> bytes:
    kind = dice.random()
    if kind < 0.1:
        return dice.randbytes(dice.randrange(200))
    if kind < 0.3:  # A shipped file with damage.
        group = dice.choice([g for g in GROUPS if CATALOGUE.choices(g)])
        folder = "model" if group in ("teacher", "student") else group
        path = (
            Path(__file__).parents[2]
            / "conf"
            / folder
            / f"{dice.choice(CATALOGUE.choices(group))}.yaml"
        )
        data = bytearray(path.read_bytes())
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(len(data))
            data[place : place + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
        return bytes(data)
    lines = [dice.choice(FRAGMENTS) for _ in range(dice.randint(1, 4))]
    return "\n".join(f"{'  ' * dice.choice((0, 0, 0, 1))}{line}" for line in lines).encode()


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)
def test_config_files(tmp_path: Path, first: int) -> None:
    refused = 0
    for seed in range(100 * first, 100 * (first + 1)):
        dice = random.Random(seed)
        folder = tmp_path / str(seed)
        group = dice.choice(("method", "dataset", "training", "recipe", "task", "trainer", "model"))
        path = folder / group / "mine.yaml"
        path.parent.mkdir(parents=True)
        path.write_bytes(config_text(dice))
        choice = "student" if group == "model" else group
        try:
            catalogue = open_catalogue([str(folder)])
            refused += bool(refusal([f"{choice}=mine"], catalogue))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        except Exception as error:
            raise AssertionError(f"input {seed}: {path.read_bytes()!r}") from error
    assert refused > 40


# -- commands -------------------------------------------------------------------------------------

VERBS = (
    *("ls", "show", "config", "cp", "resume", "diff", "store", "complete", "help", "--version"),
    *("table", "report", "eval", "export"),
)
"""Those that need no torch."""


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_commands(tmp_path: Path, monkeypatch, capsys, first: int) -> None:
    monkeypatch.chdir(tmp_path)
    had_torch = "torch" in sys.modules
    statuses = []
    for seed in range(300 * first, 300 * (first + 1)):
        dice = random.Random(seed)
        line = [dice.choice(VERBS) if dice.random() < 0.9 else text(dice)]
        line += [dice.choice((text, word))(dice) for _ in range(dice.randint(0, 3))]
        if "=" in line[0]:
            continue  # A run.
        if line[0] == "cp":
            line = line[:2]  # What has a destination may be copied there.
        statuses.append(kdrun(line))
        shown = capsys.readouterr()
        assert statuses[-1] in (0, 2), line
        assert "Traceback" not in shown.err + shown.out, line
        assert (statuses[-1] == 2) == bool(shown.err.strip()), line
    assert len(set(statuses)) == 2
    assert had_torch or "torch" not in sys.modules
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_strange_values_are_not_all_refused_for_one_reason() -> None:
    reasons = {
        line.partition(": ")[2][:20] for n in range(300) for line in refusal(words_of(n), CATALOGUE)
    }
    assert len(reasons) > 30
