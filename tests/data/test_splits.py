from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrun.data.splits import keep_classes, long_tail, per_class, stratified


@given(
    target=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_stratified_divides_all_rows_in_proportion(target, share, seed):
    target = torch.tensor(target)
    count = round(share * len(target))
    chosen, rest = stratified(target, count, seed=seed)
    assert len(chosen) == count
    assert torch.equal(torch.cat([chosen, rest]).sort().values, torch.arange(len(target)))
    assert torch.equal(chosen, chosen.sort().values)
    exact = torch.bincount(target, minlength=5).double() * count / len(target)
    found = torch.bincount(target[chosen], minlength=5)
    assert ((found - exact).abs() < 1 + 1e-9).all()


def test_stratified_depends_on_the_seed_only():
    target = torch.arange(100) % 4
    assert torch.equal(stratified(target, 40)[0], stratified(target, 40)[0])
    assert not torch.equal(stratified(target, 40)[0], stratified(target, 40, seed=1)[0])


def test_stratified_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="cannot choose 5 of 4"):
        stratified(torch.zeros(4, dtype=torch.int64), 5)


def test_per_class_takes_the_same_number_of_each():
    target = torch.tensor([0] * 10 + [1] * 5 + [2] * 7)
    assert torch.bincount(target[per_class(target, 4)]).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="class 1 has 5 samples, not 6"):
        per_class(target, 6)


def test_long_tail_falls_exponentially():
    target = torch.arange(10).repeat(500)
    sizes = torch.bincount(target[long_tail(target, 100)])
    assert sizes[0] == 500 and sizes[-1] == 5
    assert sizes.tolist() == [int(500 * 100 ** (-c / 9) + 1e-9) for c in range(10)]


def test_keep_classes_renumbers_in_the_order_given():
    rows, target = keep_classes(torch.tensor([0, 1, 2, 3, 2, 0]), [2, 0], 4)
    assert rows.tolist() == [0, 2, 4, 5]
    assert target.tolist() == [1, 0, 0, 1]
