from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kdrun.data.documents import (
    Document,
    HubText,
    StandardLibrary,
    TextFolder,
    conversation,
)
from kdrun.data.text import Text, packed_rows, padded_rows
from kdrun.data.tokenizers import ByteTokenizer, open_tokenizer
from kdrun.errors import UserError
from kdrun.outputs import next_token_batch

END = 256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KDRUN_DATA", raising=False)


def folder(root: Path, **texts: str) -> str:
    root.mkdir(exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return str(root)


def corpus(root: Path, **options) -> Text:
    texts = {f"file{number}": f"text number {number}. " * 20 for number in range(8)}
    data = Text(source=TextFolder(path=folder(root / "texts", **texts)), length=16, **options)
    data.prepare()
    return data


def ids(*numbers: int, spared: int = 0) -> tuple[torch.Tensor, int]:
    return torch.tensor(numbers, dtype=torch.int32), spared


# -- rows -----------------------------------------------------------------------------------------


def test_the_shift_is_made_once() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    batch = next_token_batch(tokens, torch.tensor([[False, False, True, True]]), torch.tensor([0]))
    assert batch.inputs.tolist() == [[5, 6, 7]]
    assert batch.target.tolist() == [[6, 7, 8]]
    assert batch.mask.tolist() == [[False, True, True]]


def test_packed_rows_by_hand() -> None:
    documents = [ids(1, 2, 3, 9), ids(4, 5, 9, spared=1), ids(6, 7, 8, 9)]
    rows = packed_rows(documents, 4, end=9, drop=False)
    # Every token but the very first is predicted exactly once; the last row is not full.
    assert rows.tokens.tolist() == [[1, 2, 3, 9], [9, 4, 5, 9], [9, 6, 7, 8]]
    assert rows.counted.tolist() == [[True] * 4, [True, False, True, True], [True] * 4]
    assert packed_rows([ids(1, 2, 9)], 4, end=9, drop=False).tokens.shape == (0, 4)


def test_padded_rows_by_hand() -> None:
    documents = [ids(1, 2, 9), ids(1, 2, 3, 4, 5, 9, spared=2), ids(1, 2, 3, 9, spared=9)]
    rows = padded_rows(documents, 4, end=9, drop=False)
    assert rows.tokens.tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    assert rows.counted.tolist() == [[True, True, True, False], [False, False, True, True]]
    assert rows.index.tolist() == [0, 1] and rows.lengths.tolist() == [3, 4]
    short = padded_rows(documents, 4, end=9, drop=True)
    assert short.index.tolist() == [0]


def test_a_batch_is_as_long_as_its_longest_row(tmp_path: Path) -> None:
    texts = {"a": "ab", "b": "abcd", "c": "abcdefgh" * 9, "d": "abc", "e": "a"}
    source = TextFolder(path=folder(tmp_path / "texts", **texts))
    data = Text(source=source, length=16, packed=False, val_fraction=0.2, test_fraction=0.2)
    data.prepare()
    loader = data.train(batch_size=1, seed=0, device="cpu", shuffle=False)
    for batch in loader:
        assert batch.mask[:, -1].all() and batch.inputs.shape == batch.target.shape


def test_splits_share_no_row_and_rows_are_limited(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    parts = [set(data._parts[part].index.tolist()) for part in ("train", "validation", "test")]
    assert not parts[0] & parts[1] and not parts[1] & parts[2]
    few = corpus(tmp_path, train_rows=10)
    assert few.train_size == 10 and few.test_size == data.test_size
    assert few.fingerprint != data.fingerprint == corpus(tmp_path).fingerprint
    assert data.num_classes == 257 and data.input_shape == (16,)


def test_a_batch_can_be_replayed_and_is_divided_among_ranks(tmp_path: Path) -> None:
    data = corpus(tmp_path)
    whole = data.train(batch_size=8, seed=3, device="cpu")
    whole.set_epoch(2, start=1)
    batch = next(iter(whole))
    assert torch.equal(batch.inputs, whole.replay(2, 1).inputs)
    halves = [
        data.train(batch_size=8, seed=3, device="cpu", rank=rank, world_size=2).replay(2, 1)
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([half.inputs for half in halves]), batch.inputs)
    assert batch.inputs.dtype == torch.int64


# -- tokenizers and sources -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_text_comes_back_from_its_tokens(name: str) -> None:
    text = "Grüße, 世界! def f(x): return x\n" * 20
    tokenizer = open_tokenizer(name, 300, [text])
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < len(tokenizer.names) and tokenizer.names[tokenizer.end] == "<|end|>"


def test_byte_pairs_are_the_same_for_the_same_text_and_kept(tmp_path: Path) -> None:
    text = " ".join(f"number {i * i} of the many numbers" for i in range(99))
    first, second = (open_tokenizer("bpe", 280, [text]) for _ in range(2))
    assert first.names == second.names and len(first.names) == 280
    assert len(first.encode(text)) < len(text) / 2
    assert len(list((tmp_path / "cache/kdrun/tokenizers").iterdir())) == 1
    assert open_tokenizer("bpe", 281, [text]).names != first.names


def test_a_models_tokenizer_from_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", unk_token="?"
    ).save_pretrained(tmp_path / "model")
    tokenizer = open_tokenizer(str(tmp_path / "model"), 0, [])
    assert tokenizer.encode("a b c") == [0, 1, 3]
    assert tokenizer.end == 2 and tokenizer.names == ["a", "b", "</s>", "?"]


def test_the_standard_library_is_always_at_hand() -> None:
    documents = StandardLibrary(bytes_at_most=50_000).load()["train"]
    size = sum(len(text.encode()) for _, text in documents)
    assert 1_000 < size <= 50_000
    assert documents == StandardLibrary(bytes_at_most=50_000).load()["train"]


def test_rows_of_a_table_become_prompts_and_answers(tmp_path: Path) -> None:
    lines = ["text,label"] + [f"film {number},{number % 2}" for number in range(6)]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "train.csv").write_text("\n".join(lines))
    source = HubText(
        name=str(tmp_path / "films"),
        prompt="{text}: ",
        template="{label}",
        names={"label": ["bad", "good"]},
        documents_at_most=3,
    )
    expected = [Document("film 0: ", "bad"), Document("film 1: ", "good")]
    assert source.load()["train"][:2] == expected and len(source.load()["train"]) == 3
    with pytest.raises(UserError, match="has no column 'genre'; it has text, label"):
        HubText(name=str(tmp_path / "films"), template="{genre}").load()
    with pytest.raises(UserError, match="has no split 'dev'; it has train"):
        HubText(name=str(tmp_path / "films"), test_split="dev").load()


def test_the_prompt_of_a_conversation_ends_where_the_last_answer_begins() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "Yes")]
    prompt, response = conversation([{"role": r, "content": c} for r, c in turns])
    assert response == "Yes</s>\n" and prompt.endswith("<|user|>\nMore</s>\n<|assistant|>\n")


def test_only_the_response_counts(tmp_path: Path) -> None:
    class Pairs:
        def load(self):
            return {"train": [Document("question ", "answer")] * 10}

    data = Text(source=Pairs(), packed=False, counted="response", length=32)
    data.prepare()
    batch = data.train(batch_size=2, seed=0, device="cpu").replay(0, 0)
    answered = batch.target[0][batch.mask[0]].tolist()
    assert ByteTokenizer().decode(answered) == "answer" and answered[-1] == END


# -- what cannot be used ---------------------------------------------------------------------------


def test_texts_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    def prepare(**options) -> None:
        Text(**{"length": 16} | options).prepare()

    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing holds no text: no file matches \*\.txt"):
        prepare(source=TextFolder(path=str(tmp_path / "nothing")))
    blank = folder(tmp_path / "blank", a="", b=" \n")
    with pytest.raises(UserError, match="blank holds no text: every file is empty"):
        prepare(source=TextFolder(path=blank))
    for place in (str(tmp_path / "missing"), "missing"):
        with pytest.raises(
            UserError, match=rf"dataset.source.path={place}: no such file or folder"
        ):
            prepare(source=TextFolder(path=place))
    short = folder(tmp_path / "short", a="word")
    with pytest.raises(UserError, match=r"train text is shorter than a row of dataset.length=16"):
        prepare(source=TextFolder(path=short))
    (tmp_path / "short" / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as utf-8 text"):
        prepare(source=TextFolder(path=short))
    with pytest.raises(UserError, match=r"dataset.vocabulary=100: must be above 256"):
        corpus(tmp_path, tokenizer="bpe", vocabulary=100)
    with pytest.raises(UserError, match=r"dataset.tokenizer=./none: there is no such folder"):
        corpus(tmp_path, tokenizer="./none")


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda tokenizer, text: [0, 300] * 20)
    with pytest.raises(UserError, match="gives the token 300, but its vocabulary has 257"):
        corpus(tmp_path)


@pytest.mark.skipif(
    not Path(os.environ.get("KDRUN_DATA", "/nowhere"), "karpathy/tiny_shakespeare").is_dir(),
    reason="KDRUN_DATA holds no karpathy/tiny_shakespeare",
)
def test_tiny_shakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRUN_DATA", DATA)
    data = Text(source=HubText(name="karpathy/tiny_shakespeare"), length=64)
    data.prepare()
    batch = data.train(batch_size=1, seed=0, device="cpu", shuffle=False).replay(0, 0)
    assert data.tokenizer.decode(batch.inputs[0].tolist()).startswith("First Citizen:")
    assert data.task_arguments["bytes_per_token"] == pytest.approx(1, abs=1e-5)


DATA = os.environ.get("KDRUN_DATA", "")
