"""From text to numbers and back: bytes, byte pairs learned from the data, or a model's own."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdrun.errors import UserError

BYTES = "byte"
BYTE_PAIRS = "bpe"
END_NAME = "<|end|>"
LEARNED_FROM = 20_000_000
"""Characters from which byte pairs are learned; more change little and take long."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
"""One of them lies in the folder of every model that comes with a tokenizer."""


class Tokenizer(Protocol):
    """Text to token ids.

    Attributes:
        names: what each id stands for, as text; their number is the size of the vocabulary.
        end: id that ends a document, and fills up what is shorter than a row.
    """

    names: list[str]
    end: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any that mark its beginning or end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; ``end`` is left out."""


class ByteTokenizer:
    """UTF-8 bytes, 0 to 255, and 256 for the end of a document."""

    end = 256

    def __init__(self) -> None:
        self.names = [f"<0x{byte:02X}>" for byte in range(256)] + [END_NAME]

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are none become the replacement character."""
        return bytes(number for number in ids if number < 256).decode(errors="replace")


class BytePairTokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., ACL 2016; Radford et al., 2019).

    Args:
        model: of the ``tokenizers`` library.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.end = model.token_to_id(END_NAME)
        self.names = [model.id_to_token(number) for number in range(model.get_vocab_size())]

    def encode(self, text: str) -> list[int]:
        """The ids."""
        return self._model.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""
        return self._model.decode(list(ids), skip_special_tokens=True)


class ModelTokenizer:
    """The tokenizer that comes with a model of transformers.

    Args:
        tokenizer: as ``AutoTokenizer`` gives it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        self.names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    def encode(self, text: str) -> list[int]:
        """The ids; words that look like special tokens become them."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def open_tokenizer(name: str, vocabulary: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of ``dataset.tokenizer``.

    Args:
        name: ``byte``, ``bpe``, or a model's name on the hub or folder.
        vocabulary: number of tokens that ``bpe`` learns.
        texts: what it learns them from.

    Raises:
        UserError: no such tokenizer, or a vocabulary too small for all bytes.
    """
    if name == BYTES:
        return ByteTokenizer()
    if name == BYTE_PAIRS:
        return BytePairTokenizer(_learned(vocabulary, texts))
    return ModelTokenizer(model_tokenizer(name))


@functools.lru_cache(maxsize=4)
def model_tokenizer(name: str) -> Any:
    """The tokenizer of a model of transformers, by name on the hub or folder.

    Raises:
        UserError: there is none, or it has no token that ends a text.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"dataset.tokenizer={name}: there is no such folder")
    try:
        tokenizer = _fetched(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"dataset.tokenizer={name}: no model's tokenizer ({reason}); else {BYTES} or "
            f"{BYTE_PAIRS}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"dataset.tokenizer={name}: it has no token that ends a text")
    return tokenizer


def vocabulary_of(name: str) -> list[str] | None:
    """What each id stands for in the tokenizer that comes with a model of transformers.

    Args:
        name: of the model, on the hub or a folder.

    Returns:
        As ``Tokenizer.names``; None where the model comes without a tokenizer.
    """
    folder = Path(name).expanduser()
    # For some kinds of model, transformers makes up an empty one.
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    try:
        tokenizer = _fetched(name)
    except (OSError, ValueError, KeyError):
        return None
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def _fetched(name: str) -> Any:
    from transformers import AutoTokenizer

    place = Path(name).expanduser()
    return AutoTokenizer.from_pretrained(str(place) if place.is_dir() else name)


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/kdrun/tokenizers``, by default below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "kdrun", "tokenizers")


def _learned(vocabulary: int, texts: Iterable[str]) -> Any:
    """Byte pairs learned from texts: the same texts give the same ones, which are kept on disk."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise UserError(
            f"dataset.vocabulary={vocabulary}: must be above {len(alphabet)}, one for each byte"
        )
    chosen, size = [], 0
    digest = hashlib.sha256(f"{tokenizers.__version__} {vocabulary}".encode())
    for text in texts:
        chosen.append(text[: LEARNED_FROM - size])
        digest.update(chosen[-1].encode())
        size += len(chosen[-1])
        if size == LEARNED_FROM:
            break
    path = cache_root() / f"{digest.hexdigest()[:24]}.json"
    if path.is_file():
        return tokenizers.Tokenizer.from_file(str(path))
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator(
        chosen,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_NAME],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may learn at once: each writes a file of its own, and moves it into place whole.
    draft = path.with_suffix(f".{os.getpid()}")
    model.save(str(draft))
    draft.replace(path)
    return model
