"""Causal language models of transformers: by name, from a folder, or new from a few numbers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kdrun.errors import UserError
from kdrun.models.external import BUILD_ERRORS
from kdrun.parameters import PositiveInt

SPARE_ROWS = 1024
"""Most rows that a vocabulary is padded by for speed; with more, it is another vocabulary."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""How configurations call the longest sequence that a network can read."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hf_lm(
    *,
    name: str | None = None,
    pretrained: bool = False,
    num_classes: PositiveInt,
    input_shape: list[int] | None = None,
    options: dict | None = None,
    resize_vocabulary: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model of transformers; its forward gives an object with ``logits``.

    Args:
        name: name on the hub, or a folder that ``save_pretrained`` has written. Null: a new network
            from ``options`` alone.
        pretrained: load its weights; otherwise only its configuration is read, and not even that
            where ``options`` say ``model_type``.
        num_classes: size of the data set's vocabulary.
        input_shape: ``(L,)``, positions of a row.
        options: entries that replace those of the configuration; without ``name`` they must say
            ``model_type`` (``llama``, ``gpt2``, ...).
        resize_vocabulary: give a pretrained network new rows for the data set's tokens, or drop
            those beyond them.
        trust_remote_code: run the Python code that comes with a hub repository.

    Raises:
        UserError: no such model, options that do not fit, files that cannot be fetched, another
            vocabulary than the data set's, or rows longer than the network's positions.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(options or {})
    label = f"hf_lm {name or options.get('model_type')}"
    if input_shape is None or len(input_shape) != 1:
        raise UserError(f"{label} reads rows of tokens, but a sample here has shape {input_shape}")
    if name is None and (pretrained or "model_type" not in options):
        raise UserError("hf_lm: give name (hub name or folder), or options.model_type")
    if name is not None and name.startswith(("/", ".", "~")):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"{label}: there is no model in that folder (no config.json)")
        name = str(folder)
    reads_name = name is not None and (pretrained or "model_type" not in options)

    def configured(**entries: Any) -> Any:
        if reads_name:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **entries)
        return AutoConfig.for_model(options["model_type"], **entries)

    known = _built(label, configured).to_dict()
    entries = {key: value for key, value in options.items() if key != "model_type"}
    unknown = next((key for key in entries if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        raise UserError(f"{label}: no option {unknown}" + (f"; {near[0]}?" if near else ""))
    entries["use_cache"] = False
    if not reads_name:
        # Ids of a vocabulary that this network does not have.
        entries = {"vocab_size": num_classes, **dict.fromkeys(TOKEN_IDS)} | entries
    config = _built(label, lambda: configured(**entries))
    _refuse_positions(label, config, input_shape)
    if not resize_vocabulary:
        _refuse_vocabulary(label, config.vocab_size, num_classes)
    if pretrained:
        network = _built(
            label,
            lambda: AutoModelForCausalLM.from_pretrained(
                name, config=config, trust_remote_code=trust_remote_code
            ),
        )
    else:
        network = _built(
            label,
            lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code),
        )
    if resize_vocabulary and config.vocab_size != num_classes:
        network.resize_token_embeddings(num_classes)
    return network


def _refuse_positions(label: str, config: Any, input_shape: Sequence[int]) -> None:
    values = config.to_dict()
    longest = next((values[key] for key in POSITIONS if values.get(key)), None)
    if longest is not None and input_shape[0] > longest:
        raise UserError(
            f"{label} has {longest} positions, but rows have {input_shape[0]}: lower "
            "dataset.length or choose another network"
        )


def _refuse_vocabulary(label: str, rows: int, num_classes: int) -> None:
    if num_classes <= rows <= num_classes + SPARE_ROWS:
        return
    raise UserError(
        f"{label} has a vocabulary of {rows}, but the data set's tokenizer has {num_classes}: set "
        "dataset.tokenizer to the model's own, which teacher and student must share, or "
        "resize_vocabulary=true"
    )


def _built(label: str, builder: Callable[[], Any]) -> Any:
    """Call ``builder``; what it raises becomes one line that names the network."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return builder()
    except OSError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{label}: its files cannot be fetched or read ({reason})") from error
    except (*BUILD_ERRORS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{label} cannot be built: {reason}") from error
