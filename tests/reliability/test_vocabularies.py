"""Weights that were made for other tokens are refused before anything is trained, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.checkpoints import save_weights
from kdrun.data.documents import TextFolder
from kdrun.data.text import Text
from kdrun.data.tokenizers import vocabulary_of
from kdrun.errors import UserError
from kdrun.given_weights import refuse_other_data, refuse_other_start
from kdrun.models.language import hf_lm
from tests.tiny import digits

GIVEN = {"checkpoint": None, "init_from": None, "finetune": False, "allow_other_data": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def network(words: int):
    options = {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
    return hf_lm(num_classes=words, input_shape=[4], options=options)


def model(folder: Path, *words: str) -> str:
    """A folder with a tiny model and its tokenizer, whose tokens are these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*words, "</s>", "?"))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="?"
    ).save_pretrained(folder)
    network(len(ids)).save_pretrained(folder)
    return str(folder)


def text(root: Path, tokenizer: str, **options) -> Text:
    (root / "texts").mkdir(exist_ok=True)
    (root / "texts" / "a.txt").write_text("a b c d " * 50)
    data = Text(
        source=TextFolder(path=str(root / "texts")), tokenizer=tokenizer, length=4, **options
    )
    data.prepare()
    return data


def test_pretrained_weights_for_other_tokens_of_the_same_number(tmp_path: Path) -> None:
    ours = model(tmp_path / "ours", "a", "b", "c", "d")
    theirs = model(tmp_path / "theirs", "a", "c", "b", "d")
    data = text(tmp_path, ours)
    said = r"theirs has another vocabulary: its token 1 is 'c', that of dataset.tokenizer 'b'; "
    node = GIVEN | {"pretrained": True, "name": theirs}
    with pytest.raises(UserError, match=f"the pretrained student .*{said}.*student.allow_other"):
        refuse_other_start(node, data)
    with pytest.raises(UserError, match=f"the pretrained teacher .*{said}.*teacher.allow_other"):
        refuse_other_data(node, "teacher", data)
    refuse_other_start(node | {"name": ours}, data)
    # Permitted, or not read: a new network of that architecture has no tokens yet.
    refuse_other_start(node | {"allow_other_data": True}, data)
    refuse_other_start(node | {"pretrained": False}, data)


def test_bytes_are_not_the_tokens_of_a_model(tmp_path: Path) -> None:
    name = model(tmp_path / "model", *(str(number) for number in range(255)))
    data = text(tmp_path, "byte")
    assert len(vocabulary_of(name)) == data.num_classes == 257
    with pytest.raises(UserError, match="its token 0 is '0', that of dataset.tokenizer '<0x00>'"):
        refuse_other_start(GIVEN | {"pretrained": True, "name": name}, data)


def test_a_model_with_some_tokens_more_is_the_same(tmp_path: Path) -> None:
    more = model(tmp_path / "more", "a", "b", "c", "d")
    data = text(tmp_path, more)
    data.class_names = data.class_names[:4]
    refuse_other_start(GIVEN | {"pretrained": True, "name": more}, data)


def test_a_model_without_a_tokenizer_tells_nothing(tmp_path: Path) -> None:
    network(6).save_pretrained(tmp_path / "bare")
    assert vocabulary_of(str(tmp_path / "bare")) is None
    node = GIVEN | {"pretrained": True, "name": str(tmp_path / "bare")}
    refuse_other_start(node, text(tmp_path, "byte"))


def test_checkpoints_for_bytes_and_byte_pairs_of_the_same_number(tmp_path: Path) -> None:
    data = text(tmp_path, "bpe", vocabulary=257)
    path = tmp_path / "bytes.safetensors"
    save_weights(network(257), path, text(tmp_path, "byte").signature)
    assert data.num_classes == 257
    said = r"another vocabulary \(257: <0x00>, .* than this data set's \(257: "
    with pytest.raises(UserError, match=f"student.init_from=.*was made for {said}"):
        refuse_other_start(GIVEN | {"init_from": str(path)}, data)
    with pytest.raises(UserError, match="teacher.checkpoint=.*was made for other classes"):
        refuse_other_data(GIVEN | {"checkpoint": str(path)}, "teacher", data)
    refuse_other_start(GIVEN | {"init_from": str(path), "allow_other_data": True}, data)
    save_weights(network(257), path, data.signature)
    refuse_other_start(GIVEN | {"init_from": str(path)}, data)


def test_a_student_of_images_may_start_from_other_classes(tmp_path: Path) -> None:
    path = tmp_path / "bytes.safetensors"
    save_weights(network(257), path, text(tmp_path, "byte").signature)
    refuse_other_start(GIVEN | {"init_from": str(path)}, digits())
