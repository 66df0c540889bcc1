"""The choice of a kernel by rows, by timings, and none inside `exact`."""

import threading
from types import SimpleNamespace

import pytest
import torch

from budwood.formats import pack_as
from budwood.kernels import dispatch, native
from budwood.kernels.dispatch import ALWAYS_FEW, NAMES, NEVER_FEW, ROWS, UNPACK, Choice, exact, kernel_for
from budwood.kernels.native import BITMASK, BY_ROWS, FEW_ROWS, MAX_FEW_ROWS, PANELS, SPARSE, TILES
from budwood.kernels.native_matrix import native_matrix


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(dispatch, "measured", {})


@pytest.fixture
def weight():
    """[48, 64], every second pair of columns zero."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(48, 64, generator=random) * (torch.arange(64) % 4 < 2)


@pytest.fixture
def matrix(weight, fastest):
    return native_matrix("bitmask", (48, 64), pack_as("bitmask", weight))


def kind(type=0, coding=BITMASK):
    return SimpleNamespace(matrix=SimpleNamespace(type=type, coding=coding))


@pytest.mark.parametrize("sparse", [True, False])
def test_without_timings_the_rows_decide(monkeypatch, sparse):
    monkeypatch.setattr(native, "has", lambda kernel: sparse)
    for rows in (1, ALWAYS_FEW, MAX_FEW_ROWS):
        assert kernel_for(kind(), rows, torch.float32) == FEW_ROWS
    for rows in (MAX_FEW_ROWS + 1, 10_000):
        assert kernel_for(kind(), rows, torch.float32) == (BY_ROWS if sparse else UNPACK)


def test_timings_decide_by_the_next_number_of_rows_that_was_timed():
    winners = dict(zip(ROWS, (FEW_ROWS, SPARSE, PANELS, SPARSE, UNPACK), strict=True))
    dispatch.measured[torch.float32, 0, False] = {rows: Choice(kernel, {}) for rows, kernel in winners.items()}
    for rows, kernel in ((3, FEW_ROWS), (4, FEW_ROWS), (5, SPARSE), (9, PANELS), (64, SPARSE), (65, UNPACK)):
        assert kernel_for(kind(), rows, torch.float32) == kernel
    assert kernel_for(kind(), 100_000, torch.float32) == UNPACK
    assert kernel_for(kind(type=1), 5, torch.float32) == FEW_ROWS  # timings of another kind of matrix do not count
    assert kernel_for(kind(coding=TILES), 5, torch.float32) == FEW_ROWS
    assert kernel_for(kind(), 5, torch.bfloat16) == FEW_ROWS
    dispatch.measured[torch.float32, 0, False] = dict.fromkeys(ROWS, Choice(UNPACK, {}))
    assert kernel_for(kind(), ALWAYS_FEW, torch.float32) == FEW_ROWS


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_products_are_the_reference_and_none_where_unpacking_wins(matrix, weight, rows):
    x, bias = torch.randn(2, rows, 64), torch.randn(48)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(dispatch.linear(matrix, x, bias), expected, rtol=1e-4, atol=1e-4)
    dispatch.measured[dispatch.kind_of(matrix, torch.float32)] = dict.fromkeys(ROWS, Choice(UNPACK, {}))
    found = dispatch.linear(matrix, x, bias)
    assert (found is None) == (2 * rows > ALWAYS_FEW)


def test_inside_exact_nothing_is_native_and_afterwards_it_is_again(matrix):
    x = torch.randn(2, 64)
    with exact():
        assert dispatch.linear(matrix, x, None) is None
        with exact():
            pass
        assert dispatch.is_exact()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(dispatch.is_exact()))
        thread.start()
        thread.join()
        assert elsewhere == [False]  # of this thread only
    with pytest.raises(KeyError), exact():
        raise KeyError
    assert not dispatch.is_exact()
    assert dispatch.linear(matrix, x, None) is not None


def test_all_available_kernels_are_timed_once_for_each_number_of_rows(matrix, weight):
    rows_seen = []

    def unpacked(x):
        rows_seen.append(len(x))
        return x @ weight.T

    dispatch.measure(matrix, unpacked, torch.float32)
    (found,) = dispatch.measured.values()
    assert tuple(found) == ROWS
    for rows, choice in found.items():
        assert choice.seconds[NAMES[choice.kernel]] == min(choice.seconds.values())
        if rows > NEVER_FEW:
            assert NAMES[UNPACK] in choice.seconds
            assert NAMES[FEW_ROWS] not in choice.seconds
        elif native.has(SPARSE):
            assert {NAMES[FEW_ROWS], NAMES[SPARSE]} <= set(choice.seconds)
            assert NAMES[UNPACK] not in choice.seconds
    assert min(rows_seen) > NEVER_FEW or not native.has(SPARSE)
    rows_seen.clear()
    dispatch.measure(matrix, unpacked, torch.float32)
    assert rows_seen == []


def test_the_median_decides_and_not_the_best_call(monkeypatch):
    times = {FEW_ROWS: [1.0, 5.0, 5.0], SPARSE: [3.0, 3.0, 3.0]}
    monkeypatch.setattr(dispatch, "interleaved", lambda runners, rounds: {kernel: times[kernel] for kernel in runners})
    choice = dispatch.fastest({FEW_ROWS: list, SPARSE: list})
    assert choice == Choice(SPARSE, {NAMES[FEW_ROWS]: 5.0, NAMES[SPARSE]: 3.0})
