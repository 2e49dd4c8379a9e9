"""Encoded sound clips with their classes: one split of a hub data set, decoded once."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdrun.data.sources import classes_of, content_of, data_files, data_folder, open_split
from kdrun.errors import UserError


@dataclass(frozen=True)
class Recordings:
    """The clips of one split.

    Attributes:
        waves: ``(N, samples)`` float32 in [-1, 1], cut or filled with zeros at the end.
        lengths: ``(N,)`` samples that come from the clip, at most ``samples``.
        target: ``(N,)`` int64 class ids.
        class_names: by class id.
        content: hash of what the clips were read from.
    """

    waves: Tensor
    lengths: Tensor
    target: Tensor
    class_names: list[str]
    content: str


def open_recordings(
    name: str, split: str, *, audio_column: str, label_column: str, sample_rate: int, samples: int
) -> Recordings:
    """Read all clips of a split; the last few splits read are kept in memory.

    Args:
        name: of a hub data set, or of a folder of the same layout (see ``data_folder``).
        split: as the data set calls it.
        audio_column: the encoded clips (FLAC, WAV, Ogg, MP3).
        label_column: the classes.
        sample_rate: that all clips must have.
        samples: length to which clips are cut or filled.

    Raises:
        UserError: one line: no such data set, split or column; no soundfile; a clip that is no
            sound, empty, or of another rate, naming its row.
    """
    columns = (audio_column, label_column)
    return _read(name, data_folder(name), split, columns, sample_rate, samples)


@functools.lru_cache(maxsize=4)
def _read(
    name: str,
    folder: Path | None,
    split: str,
    columns: tuple[str, str],
    sample_rate: int,
    samples: int,
) -> Recordings:
    import datasets

    audio, label = columns
    wanted = {"audio_column": audio, "label_column": label}
    rows = open_split(name, split, wanted, folder).select_columns(list(columns))
    if isinstance(rows.features[audio], datasets.Audio):
        rows = rows.cast_column(audio, datasets.Audio(decode=False))
    place = f"{folder or name}, {split}"
    target, class_names = classes_of(rows, label, place)
    waves, lengths = torch.zeros(len(rows), samples), torch.zeros(len(rows), dtype=torch.int64)
    for number, value in enumerate(rows[audio]):
        wave = _decoded(value, f"{place}, row {number}", audio, sample_rate)[:samples]
        waves[number, : len(wave)] = wave
        lengths[number] = len(wave)
    files = data_files(folder) if folder else []
    content = f"{name} {split} {content_of(files, folder) if folder else rows._fingerprint}"
    return Recordings(waves, lengths, target, class_names, content)


def _decoded(value: Any, where: str, column: str, sample_rate: int) -> Tensor:
    """One clip as a wave ``(samples,)``, the mean of its channels."""
    try:
        import soundfile
    except ImportError:
        raise UserError("reading sound needs soundfile: pip install 'kdrun[audio]'") from None
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    if value is None:
        raise UserError(f"{where} holds no sound")
    if not isinstance(value, bytes):
        raise UserError(f"{where}: the column {column!r} does not hold encoded sound")
    try:
        wave, rate = soundfile.read(io.BytesIO(value), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{where} cannot be read as sound: {error.error_string}") from error
    if not len(wave):
        raise UserError(f"{where} is an empty clip")
    if rate != sample_rate:
        raise UserError(f"{where}: {rate} samples a second, dataset.sample_rate is {sample_rate}")
    return torch.from_numpy(wave).mean(1)
