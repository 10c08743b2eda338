"""How a window is laid out as batches, and when its memory is used again."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.streams import dealt
from storage.windows import Layout, Memory


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """The part that some streams have of a window."""
    n_streams, take = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    count, n_rows = draw(st.integers(0, 60)), draw(st.integers(0, 120))
    step = draw(st.integers(1, n_streams))
    streams = range(draw(st.integers(0, step - 1)), n_streams, step)
    before = min(dealt(count, stream, n_streams) for stream in streams) // take
    return (
        Layout(
            starts=tuple(dealt(count, stream, n_streams) for stream in streams),
            ends=tuple(dealt(count + n_rows, stream, n_streams) for stream in streams),
            take=take,
            first_batch=draw(st.sampled_from([0, before, before + 1, before + 3])),
        ),
        take,
    )


@given(layouts())
def test_every_wanted_row_has_a_place_of_its_own_in_its_batch(drawn: tuple[Layout, int]) -> None:
    layout, take = drawn
    rows = layout.n_whole * layout.batch_rows
    memory = np.full((layout.n_rows, 2), -1)
    for stream, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
        places = layout.places(stream)
        assert len(places) == end - start
        wanted = places[places != layout.waste]
        assert len(set(wanted.tolist())) == len(wanted)
        assert (memory[wanted] == -1).all(), "two rows have one place"
        memory[places] = [[stream, row] for row in range(start, end)] or np.zeros((0, 2), int)
    for number in range(layout.n_whole):
        batch = memory[:rows][number * layout.batch_rows : (number + 1) * layout.batch_rows]
        first = (layout.first_whole + number) * take
        expected = [[stream, row] for stream in range(len(layout.starts)) for row in range(first, first + take)]
        assert batch.tolist() == expected
    for stream, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
        before, after = layout.loose(memory, stream)
        first, last = layout.first_whole * take, (layout.first_whole + layout.n_whole) * take
        wanted_rows = [row for row in range(start, end) if row >= layout.first_batch * take]
        assert before.tolist() == [[stream, row] for row in wanted_rows if row < first]
        assert after.tolist() == [[stream, row] for row in wanted_rows if row >= max(first, last)]


def test_as_many_batches_as_possible_are_whole() -> None:
    layout = Layout(starts=(5, 5), ends=(41, 40), take=8, first_batch=0)
    assert (layout.first_whole, layout.n_whole) == (1, 4)


@pytest.mark.parametrize("held", ["array", "tensor", "slice of a tensor"])
def test_memory_is_used_again_when_nobody_holds_it(held: str) -> None:
    memory = Memory(4, np.dtype(np.float32))
    first = memory.rows(10)
    address = first.ctypes.data
    holder = {
        "array": lambda: first,
        "tensor": lambda: torch.from_numpy(first),
        "slice of a tensor": lambda: torch.from_numpy(first)[3:5],
    }[held]()
    del first
    gc.collect()
    second = memory.rows(10)
    assert second.ctypes.data != address
    del holder
    gc.collect()
    third = memory.rows(10)
    assert third.ctypes.data == address


def test_memory_that_is_too_small_is_replaced() -> None:
    memory = Memory(4, np.dtype(np.float32))
    small = memory.rows(10)
    del small
    gc.collect()
    assert len(memory.rows(1000)) >= 1000
