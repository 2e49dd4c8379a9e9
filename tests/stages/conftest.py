from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.experiment import prepare_data
from kdrun.interruption import SignalWatch
from kdrun.logs import Console
from kdrun.stages.stage import Context
from kdrun.store import Store
from tests.tiny import tiny_config

MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    """Contexts of tiny runs that share one store; what they say is in ``log.txt``."""

    def make(*words: str) -> Context:
        config = tiny_config(tmp_path, *words)
        data, task = prepare_data(config.values)
        console = Console("off")
        console.file = tmp_path / "log.txt"
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        return Context(
            config=config.values,
            names=config.names,
            data=data,
            task=task,
            store=Store(tmp_path / "store", console.say),
            run_directory=directory,
            console=console,
            watch=SignalWatch(),
        )

    return make
