"""Memory between two uses: it comes back with the last view of an array, and never before."""

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.buffers import LEAST_BYTES, Buffers

MIB = 1 << 20
SHAPE = (3, 1024, 1024)


def address(array):
    return array.__array_interface__["data"][0]


VIEWS = {
    "itself": lambda array: array,
    "a slice": lambda array: array[:, 5:9, 3:4],
    "a slice of a slice": lambda array: array[1][5:500][3],
    "turned": lambda array: array.transpose(2, 0, 1)[::-1],
    "reshaped": lambda array: array.reshape(-1)[7:],
    "other numbers": lambda array: array.view(np.uint16),
    "spread": lambda array: np.broadcast_to(array[:1], SHAPE),
    "windows": lambda array: np.lib.stride_tricks.sliding_window_view(array, (1, 4, 4)),
    "bytes": memoryview,
    "bytes as an array": lambda array: np.asarray(memoryview(array)),
    "a buffer": lambda array: np.frombuffer(array, np.uint8),
    "no copy": np.ascontiguousarray,
    "a tensor": torch.from_numpy,
    "a part of a tensor": lambda array: torch.from_numpy(array).permute(1, 2, 0)[4:6],
    "an array of a tensor": lambda array: torch.from_numpy(array)[1].numpy(),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_memory_comes_back_with_the_last_view_and_not_before(kind):
    buffers = Buffers(64 * MIB)
    array = buffers.empty(SHAPE, np.uint8)
    place = address(array)
    view = VIEWS[kind](array)
    del array
    gc.collect()
    assert buffers.waiting_bytes == 0
    other = buffers.empty(SHAPE, np.uint8)
    assert address(other) != place
    del view
    gc.collect()
    assert buffers.waiting_bytes == 3 * MIB
    assert address(buffers.empty(SHAPE, np.uint8)) == place


def test_an_array_is_as_numpy_makes_it():
    array = Buffers(64 * MIB).empty((3, 700, 801), ">f4")
    wanted = np.empty((3, 700, 801), ">f4")
    assert (array.shape, array.dtype, array.strides) == (wanted.shape, wanted.dtype, wanted.strides)
    assert type(array) is np.ndarray
    assert array.flags.writeable
    assert array.flags.aligned


def test_small_arrays_are_left_to_malloc():
    buffers = Buffers(64 * MIB)
    for shape in [(LEAST_BYTES - 1,), (0, 5), ()]:
        assert buffers.empty(shape, np.uint8).flags.owndata
    assert buffers.waiting_bytes == 0


def test_no_more_waits_than_the_limit_and_the_longest_unused_goes_first():
    buffers = Buffers(8 * MIB)
    arrays = [buffers.empty((n * MIB,), np.uint8) for n in (3, 4, 5)]
    while arrays:
        arrays.pop(0)
    assert buffers.waiting_bytes == 5 * MIB
    buffers.keep(4 * MIB)
    assert buffers.waiting_bytes == 0


def test_much_larger_memory_is_not_taken_for_a_small_array():
    buffers = Buffers(64 * MIB)
    del (large := [buffers.empty((16 * MIB,), np.uint8)])[0]
    small = buffers.empty((2 * MIB,), np.uint8)
    assert buffers.waiting_bytes == 16 * MIB
    del small
    fitting = buffers.empty((12 * MIB,), np.uint8)
    assert buffers.waiting_bytes == 2 * MIB
    assert (fitting.size, large) == (12 * MIB, [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=40))
def test_what_is_held_is_never_written_by_others(steps):
    buffers = Buffers(6 * MIB)
    held = []
    for number, (size, drop) in enumerate(steps):
        array = buffers.empty((size * MIB + number,), np.uint8)
        array[...] = number
        held.append((number, array[100:][::2]))
        del array
        if drop < len(held):
            del held[drop]
        assert all((view == value).all() for value, view in held)
        assert buffers.waiting_bytes <= 6 * MIB


def test_threads_never_share_memory():
    buffers = Buffers(64 * MIB)
    wrong = []

    def work(value):
        for _ in range(60):
            array = buffers.empty((MIB + 7,), np.uint8)
            array[...] = value
            view = array[::3]
            del array
            if not (view == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Two at a time in each thread, of two whole MiB.
    assert 0 < buffers.waiting_bytes <= 6 * 2 * 2 * MIB


def test_memory_comes_back_amid_the_work_of_its_own_thread():
    """The collector runs anywhere: an array in a cycle goes while the list is being looked at."""

    class Cycle:
        def __init__(self, array):
            self.array, self.me = array, self

    def work():
        for turn in range(300):
            gc.set_threshold(1 + turn % 7)
            Cycle(buffers.empty((MIB,), np.uint8))
            buffers.empty((MIB,), np.uint8)
            buffers.keep(8 * MIB)
            assert buffers.waiting_bytes <= 8 * MIB
        done.append(True)

    buffers, done = Buffers(8 * MIB), []
    often = gc.get_threshold()
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(30)
    finally:
        gc.set_threshold(*often)
    assert done
