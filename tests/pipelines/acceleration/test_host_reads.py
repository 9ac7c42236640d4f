"""What was read of a tensor is not read again, and never taken for that of another."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from vidaccel.pipelines.acceleration.host_reads import place_in, read_once


@pytest.fixture
def reads():
    seen = []

    @read_once
    def total(*tensors: torch.Tensor) -> float:
        seen.append(tensors[0].shape)
        return sum(float(x.sum()) for x in tensors)

    return total, seen


def test_a_tensor_is_read_once(reads):
    total, seen = reads
    first, second = torch.ones(3), torch.ones(3)
    assert [total(first), total(second), total(first), total(second)] == [3.0] * 4
    assert len(seen) == 2


def test_one_that_was_written_to_is_read_again(reads):
    total, seen = reads
    x = torch.ones(3)
    assert total(x) == 3
    x[0] = 5
    assert total(x) == 7 and len(seen) == 2
    view = x[:1]
    view.zero_()
    assert total(x) == 2 and len(seen) == 3


def test_all_of_several_have_to_be_the_same(reads):
    total, seen = reads
    first, second, third = (torch.full((2,), float(i)) for i in range(3))
    assert total(first, second) == 2 and total(first, third) == 4 and total(first, second) == 2
    assert len(seen) == 3
    second.add_(1)
    assert total(first, second) == 4
    assert total(first) == 0 and len(seen) == 5  # and as many of them


def test_tensors_of_inference_mode_do_not_tell_and_are_read_each_time(reads):
    total, seen = reads
    with torch.inference_mode():
        x = torch.ones(2)
        assert total(x) == 2
        x.add_(1)
        assert total(x) == 4 and len(seen) == 2


def test_tensors_that_were_read_are_not_kept_alive(reads):
    total, _ = reads
    first, second = torch.ones(2), torch.ones(2)
    total(first, second)
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


TABLE = torch.arange(10.0) * 7


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (TABLE[3], 3),
        (TABLE[4].expand(5), 4),
        (TABLE[0].expand(2)[:, None], 0),
        (list(TABLE)[9], 9),
        (TABLE[2:3], 2),
        (TABLE[2:4], None),
        (TABLE[3].clone(), None),
        (TABLE.clone()[3], None),
        (TABLE[3].double(), None),
    ],
)
def test_a_view_of_one_row_is_known_without_its_value(part, place):
    assert place_in(TABLE, part) == place


def test_a_table_that_is_itself_a_view_counts_its_own_rows():
    table = TABLE[2::2]
    assert place_in(table, TABLE[4]) == 1 and place_in(table, TABLE[5]) is None
    assert place_in(table, TABLE[0]) is None and place_in(TABLE[:3], TABLE[5]) is None
    assert place_in(TABLE[3].expand(4), TABLE[3]) is None  # of all rows alike, none
