"""Whatever is typed, the answer is a valid config or lines of text, never a traceback."""

import random

import pytest

from kdrun.catalogue import open_catalogue
from kdrun.config import Config, compose
from kdrun.errors import ConfigErrors

KEYS = [
    *("seed", "protocol", "method", "student", "teacher", "dataset", "training", "model@student"),
    *("method.temperature", "method.weight", "training.optimizer.lr", "training.optimizer"),
    *("training.scheduler.milestones", "training.teacher", "student.init_from", "student.widths"),
    *("trainer.devices", "trainer.precision", "recipe.stages.teacher._target_", "allow_packages"),
    *("dataset.views.strong.flip", "dataset.augmentation", "logger.offline", "nothing", "a.b.c"),
]
VALUES = [
    *("1", "0", "-1", "1e-3", "1.5", "true", "null", "", "kd", "resnet8", "timm/x", "os.system"),
    *("[1,2]", "[]", "{a: 1}", "{}", "{_target_: os.system}", "{_target_: torch.optim.SGD}"),
    *("a b", "'quoted'", '"', "[", "{", "${seed}", "${nope}", "${", "1,2", "range(3)", "glob(*)"),
    *("interval(0,1)", "choice(1,2)", "=", "a=b", "ünï", "\\", "..", "a..b", "@x", "kd,", ",", "~"),
    *("nan", "inf", "1_000", "0x10", "???", "*", "!!python/object:os.system", "\n", "\t", "a:b"),
]
PREFIXES = ["", "", "", "", "+", "++", "~", "-", " "]


def mangled(text: str, dice: random.Random) -> str:
    """``text`` with a character dropped, doubled or replaced, sometimes."""
    if not text or dice.random() < 0.6:
        return text
    place = dice.randrange(len(text))
    change = dice.choice(["", text[place] * 2, dice.choice("._=x@/ ")])
    return text[:place] + change + text[place + 1 :]


@pytest.mark.parametrize("chunk", range(4))
def test_never_a_traceback(chunk):
    dice = random.Random(chunk)
    catalogue = open_catalogue()
    refused = 0
    for _ in range(100):
        words = [
            f"{dice.choice(PREFIXES)}{mangled(dice.choice(KEYS), dice)}"
            f"{'=' if dice.random() < 0.95 else ''}{mangled(dice.choice(VALUES), dice)}"
            for _ in range(dice.randint(1, 4))
        ]
        try:
            assert isinstance(compose(words, catalogue), Config)
        except ConfigErrors as error:
            refused += 1
            assert error.problems, words
            assert all(line.strip() and "\n" not in line for line in error.problems), words
            assert len(error.problems) == len(set(error.problems)), words
    assert refused > 50
