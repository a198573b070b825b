"""The reused CPU buffers: as torch.empty to whoever asks, and no more memory than was in use at once."""

import math
import threading

import pytest
import torch

from fastvae.ops import _buffers

MIB = 2**18  # fp32 numbers of a mebibyte


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    monkeypatch.setattr(_buffers, "_pool", {})


def test_memory_is_reused_only_when_nobody_holds_it():
    one = _buffers.empty((4, MIB), torch.float32)
    two = _buffers.empty((4, MIB), torch.float32)
    assert one.data_ptr() != two.data_ptr()
    place, view = one.data_ptr(), one.t()[3:]
    del one
    assert _buffers.empty((4, MIB), torch.float32).data_ptr() != place, "a view holds it"
    del view
    assert _buffers.empty((MIB, 4), torch.float32).data_ptr() == place


def test_the_tightest_fit_is_taken_and_a_far_too_large_one_is_not():
    large, small = (_buffers.empty((n, MIB), torch.float32) for n in (7, 4))
    places = large.data_ptr(), small.data_ptr()
    del large, small
    again = [_buffers.empty((n, MIB), torch.float32) for n in (4, 6)]
    assert [t.data_ptr() for t in again] == [places[1], places[0]]
    del again
    assert _buffers.empty((3, MIB), torch.float32).data_ptr() == places[1]
    assert _buffers.empty((1, MIB), torch.float32).data_ptr() not in places
    assert _buffers.empty((7, MIB), torch.bfloat16).data_ptr() not in places


def test_small_and_huge_requests_are_not_kept():
    _buffers.empty((10,), torch.float32)
    _buffers.empty((_buffers.MAX_BYTES // 4 + 1,), torch.float32)
    assert _buffers._pool == {}


def test_no_more_than_a_few_are_kept():
    held = [_buffers.empty((4, MIB), torch.float32) for _ in range(10)]
    assert len(_buffers._pool[torch.float32]) == _buffers.KEPT_PER_DTYPE
    assert len({t.data_ptr() for t in held}) == 10


def test_deterministic_mode_fills_a_reused_buffer_with_nan():
    assert torch.are_deterministic_algorithms_enabled()  # tests/conftest.py
    _buffers.empty((4, MIB), torch.float32).zero_()
    assert math.isnan(_buffers.empty((4, MIB), torch.float32).sum())


def test_threads_never_share_a_buffer():
    wrong = []

    def work(number):
        for _ in range(50):
            buffer = _buffers.empty((2, MIB), torch.float32).fill_(number)
            if not (buffer == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
