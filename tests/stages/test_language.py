"""Whole experiments on text: trained, killed and continued, at full scale in miniature."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kdrun.cli import run as kdrun
from tests.reliability.interrupted import (
    Ending,
    Journal,
    outcome,
    run_until,
    watched,
    without_times,
)
from tests.tiny import WORDS, run

pytestmark = pytest.mark.slow

ROWS, BATCH, EPOCHS = 48, 16, 2
PHASE = ROWS // BATCH * EPOCHS
"""Steps of each of the three trainings: teacher, alone, distil."""


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        sentences = (f"{i} times {number} is {i * number}.\n" for i in range(40))
        (folder / f"{number}.txt").write_text("".join(sentences))
    return (
        "method=taid",
        "dataset=text_folder",
        f"dataset.source.path={folder}",
        "dataset.length=16",
        f"dataset.train_rows={ROWS}",
        "teacher=llama_nano",
        "student=gpt2_nano",
        f"training.epochs={EPOCHS}",
        f"training.batch_size={BATCH}",
        "teacher.allow_chance=true",
    )


@pytest.mark.parametrize(
    ("phase", "ending"),
    [
        ("within distilling", Ending("step", 2 * PHASE + 4, often=True)),
        ("between training alone and distilling", Ending("step", 2 * PHASE + 1, often=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_taid_killed_continues_exactly(tmp_path: Path, words, phase: str, ending: Ending) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        root.mkdir()
    with watched(Journal(whole / "journal")) as seen:
        expected, _ = run(whole / "out", *words)
    assert seen.steps == 3 * PHASE
    assert run_until(ending, killed, words) == -signal.SIGKILL
    with watched(Journal(killed / "journal"), often=ending.often):
        result, directory = run(killed / "out", *words)
    assert without_times(result["networks"]) == without_times(expected["networks"])
    assert outcome(killed) == outcome(whole)
    rows = outcome(killed)[str(directory.relative_to(killed / "out") / "metrics.csv")]
    shares = [float(row["taid_t"]) for row in rows]
    assert shares == sorted(shares) and shares[0] > 0.4


def test_the_teachers_text_is_written_once_and_learned_from(tmp_path: Path, words) -> None:
    short = [*words, "method=seqkd", "recipe.stages.generated.prompt_tokens=4"]
    result, _ = run(tmp_path / "out", *short)
    (stored,) = (tmp_path / "out" / "store" / "generated_text").glob("*/rows.safetensors")
    rows = safetensors.torch.load_file(stored)
    assert rows["tokens"].shape == (ROWS, 17)
    assert not rows["counted"][:, :4].any() and rows["counted"][:, 4].all()
    written = stored.stat().st_mtime_ns
    again, _ = run(tmp_path / "out", *short, "seed=1")
    assert stored.stat().st_mtime_ns == written
    for found in (result, again):
        assert set(found["networks"]) == {"teacher", "alone", "distilled"}
        assert found["networks"]["distilled"]["test_last"]["loss"] < 6


@pytest.mark.parametrize(
    "more",
    [
        ("method=gkd", "method.new_tokens=8", "method.prompt_tokens=4"),
        ("method=divergence", "method.divergence=adaptive_kl", "task.chunk=10"),
        ("method=taid", "task.chunk=10", "trainer.accumulate=2"),
        ("method=kd",),
        ("method=sinkhorn", "method.preset=superglue", "method.points=tokens_per_sequence"),
    ],
    ids=lambda more: more[0],
)
def test_methods_on_text(tmp_path: Path, words, more: tuple[str, ...]) -> None:
    result, _ = run(tmp_path / "out", *words, *more)
    test = result["networks"]["distilled"]["test_last"]
    assert set(test) >= {"loss", "perplexity", "accuracy", "bits_per_byte", "kl", "agreement"}
    assert test["loss"] < 5.5


def test_parts_of_a_batch_weigh_by_the_tokens_that_count(tmp_path: Path, words) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    for number in range(60):
        (lines / f"{number}.txt").write_text("word " * (number % 5 + 1))
    more = (f"dataset.source.path={lines}", "dataset.packed=false", "method=divergence")
    more += ("dataset.length=32", "training.epochs=1")
    found = {}
    for parts in (1, 4):
        _, directory = run(tmp_path / "out", *words, *more, f"trainer.accumulate={parts}")
        found[parts] = safetensors.torch.load_file(directory / "student.safetensors")
    for name, value in found[1].items():
        torch.testing.assert_close(found[4][name], value, rtol=1e-4, atol=1e-5)


PHI3 = "{model_type:phi3,hidden_size:16,intermediate_size:32,num_hidden_layers:2,"
LLAMA = "{model_type:llama,hidden_size:8,intermediate_size:16,num_hidden_layers:1,"
HEADS = "num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:64}"


def test_instruction_tuning_of_the_paper_in_miniature(tmp_path: Path) -> None:
    """The full-scale configuration, on networks of the same classes and conversations of ours."""
    chats = tmp_path / "chats"
    chats.mkdir()
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]
    lines = [json.dumps({"messages": turns}) for _ in range(80)]
    for split in ("train", "test"):
        (chats / f"{split}.jsonl").write_text("\n".join(lines))
    words = [
        *("method=taid", "dataset=ultrachat", "teacher=phi3_mini", "student=tinyllama"),
        *("method.alpha=0.0005", "trainer=cpu", "trainer.progress=off", "dry=true"),
        *(f"output_dir={tmp_path / 'out'}", "teacher.allow_chance=true"),
        *(f"dataset.source.name={chats}", "dataset.source.train_split=train"),
        *("dataset.source.test_split=test", "dataset.tokenizer=byte", "dataset.length=64"),
        *("dataset.val_fraction=0.1", "training.batch_size=4", "task.chunk=50"),
        *("teacher.name=null", "teacher.pretrained=false", f"teacher.options={PHI3}{HEADS}"),
        *("student.name=null", "student.pretrained=false", f"student.options={LLAMA}{HEADS}"),
    ]
    assert kdrun(["validate", *words]) == 0
    assert kdrun(words) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (("dataset.source.path=/nowhere",), "source.path=/nowhere: no such file or folder"),
        (("dataset.length=9000",), "text is shorter than a row of dataset.length=9000 tokens"),
        (("teacher.options.max_position_embeddings=8",), "has 8 positions, but rows have 16"),
        (
            ("teacher=hf_lm", f"teacher.options={LLAMA}vocab_size:100,{HEADS}"),
            "has a vocabulary of 100, but the data set's tokenizer has 257",
        ),
        (
            ("student=hf_lm", f"student.options={LLAMA}vocab_size:5000,{HEADS}"),
            "has a vocabulary of 5000, but the data set's tokenizer has 257",
        ),
        (("teacher.name=./none", "teacher.pretrained=true"), "there is no model in that folder"),
        (("method=kd", "task.chunk=4"), "KD reads all logits at once; set task.chunk=null"),
        (("task=classification",), "this data set is for language_modelling"),
        (("method=sinkhorn", "method.points=label_words"), "nothing marks where responses begin"),
        (
            ("method=sinkhorn", "method.points=label_words", "method.label_words=[5,300]"),
            "nothing marks where responses begin",
        ),
        (
            ("method=sinkhorn", "method.points=tokens", "method.label_words=[5,300]"),
            "label_words: 300 is no token, the vocabulary has 257",
        ),
        (("method=gkd", "method.end_token=300"), "end_token=300: the vocabulary has 257 tokens"),
        (("method=gkd", "student.options.n_positions=100"), "cannot read the 144 tokens that"),
        (("method=gkd", "teacher.cache=logits"), "GKD changes the batches that its teacher sees"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_training(
    tmp_path: Path, words, capsys, changes, line
) -> None:
    chosen = {word.partition("=")[0]: word for word in (*WORDS, *words, *changes)}
    assert kdrun([*chosen.values(), f"output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (("method=rkd",), "RKD is made for classification, not for language_modelling"),
        (
            ("dataset=digits", "method=seqkd", "teacher=mlp", "student=mlp"),
            "the teacher can write text only",
        ),
    ],
)
def test_what_fits_no_text_is_refused_before_training(
    tmp_path, capsys, words, changes, line
) -> None:
    kept = [word for word in words if not (changes[0] == "dataset=digits" and "dataset." in word)]
    chosen = {word.partition("=")[0]: word for word in (*WORDS, *kept, *changes)}
    assert kdrun([*chosen.values(), f"output_dir={tmp_path / 'out'}"]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out" / "store").exists()
