"""Networks trained by several processes are shared with single runs where they are the same."""

from __future__ import annotations

import pytest

from kdrun.stages.train import TrainAlone, TrainTeacher

BATCH_NORM, NONE = "small_cnn", "mlp"


@pytest.mark.parametrize(("entry", "stage"), [("teacher", TrainTeacher), ("student", TrainAlone)])
def test_the_key_tells_processes_apart_where_batches_are_normalised(
    make_context, entry: str, stage
) -> None:
    def key(network: str, *words: str) -> dict:
        return stage().key(make_context(f"{entry}={network}", *words))

    several = ("trainer=ddp", "trainer.accelerator=cpu")
    assert key(NONE, *several) == key(NONE), "the same network: found in the store by both"
    assert "processes" not in key(BATCH_NORM), "as before there were several"
    two, four = (key(BATCH_NORM, *several, f"trainer.devices={n}") for n in (2, 4))
    assert (two["processes"], four["processes"]) == (2, 4)
    assert two != key(BATCH_NORM)
