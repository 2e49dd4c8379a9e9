from __future__ import annotations

from collections import Counter

import pytest

from kdrun.architectures.space import SearchSpace
from kdrun.data.seeding import stream

DEPTHS = SearchSpace({"blocks": [[1, 3, 5, 7]] * 3})
MIXED = SearchSpace({"width": [8, 16, 32], "blocks": [[1, 2], [4]]})


def test_the_candidates_of_a_space() -> None:
    assert DEPTHS.size == len(list(DEPTHS)) == len(set(DEPTHS)) == 64
    assert DEPTHS.options((0, 3, 1)) == {"blocks": [1, 7, 3]}
    assert MIXED.size == 6
    assert [MIXED.options(choices) for choices in MIXED][:3] == [
        {"width": 8, "blocks": [1, 4]},
        {"width": 8, "blocks": [2, 4]},
        {"width": 16, "blocks": [1, 4]},
    ]


def test_samples_are_uniform_and_named_by_the_generator() -> None:
    generator = stream(0)
    counts = Counter(DEPTHS.sample(generator) for _ in range(6400))
    assert len(counts) == 64 and max(counts.values()) < 160 and min(counts.values()) > 50
    assert DEPTHS.sample(stream(3)) == DEPTHS.sample(stream(3))


@pytest.mark.parametrize("count", [1, 2])
def test_a_mutation_changes_so_many_choices(count: int) -> None:
    generator = stream(1)
    seen = set()
    for _ in range(300):
        child = DEPTHS.mutate((0, 1, 3), generator, count)
        assert sum(a != b for a, b in zip(child, (0, 1, 3), strict=True)) == count
        seen.add(child)
    assert len(seen) == (9 if count == 1 else 27)
    # A place without another value stays; where there is none at all, so does the candidate.
    assert {MIXED.mutate((0, 0, 0), generator)[2] for _ in range(20)} == {0}
    assert SearchSpace({"width": [8]}).mutate((0,), generator) == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no option to choose"),
        ({"width": 8}, r"space\.width: must be a list"),
        ({"width": []}, r"space\.width: must be a list"),
        ({"width": [8, 8]}, r"space\.width: needs different values"),
        ({"blocks": [[1, 2], []]}, r"space\.blocks: needs different values"),
    ],
)
def test_a_space_without_a_choice_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(options)
