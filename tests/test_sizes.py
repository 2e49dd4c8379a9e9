"""Numbers of bytes as people read them."""

from __future__ import annotations

import pytest

from kdrun.sizes import in_words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (3 << 30, "3.0 GiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words
