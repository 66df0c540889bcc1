"""A `GpuMatrix` multiplies as the dense matrix does on any machine; the fastest kernel is kept."""

import logging

import pytest
import torch
from matrices import SHAPES, pruned, relative
from torch.nn import functional as F

from budwood.kernels import gpu


@pytest.fixture(autouse=True)
def no_results(monkeypatch):
    monkeypatch.setattr(gpu, "results", {})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("free", [True, False], ids=["chosen", "given"])
def test_products_equal_the_dense_ones(shape, free):
    weight, base = pruned(*shape, torch.bfloat16)
    layer = gpu.gpu_matrix(weight, None if free else base)
    x, bias = torch.randn(2, 3, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    assert layer.linear(x).shape == (2, 3, shape[0])
    assert torch.equal(layer.linear(x, bias), F.linear(x, weight, bias))
    assert layer.linear(x[:0]).shape == (0, 3, shape[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_one_sentence_gives_the_reason_why_there_are_no_kernels():
    assert gpu.why_not() == "the GPU kernels need a CUDA device and torch finds none"
    weight, base = pruned(32, 64, 0.1, torch.bfloat16)
    assert set(gpu.gpu_matrix(weight, base).candidates(1)) == {"unpack"}


def test_kernels_are_timed_once_for_each_class_of_rows(monkeypatch, caplog):
    weight, base = pruned(32, 64, 0.1, torch.bfloat16)
    layer = gpu.gpu_matrix(weight, base)
    calls = []

    def direct(x, bias):
        calls.append(x.shape[0])
        return F.linear(x, weight, bias)

    monkeypatch.setattr(layer, "candidates", lambda rows: {"direct": direct, "unpack": layer._unpacked})
    with caplog.at_level(logging.INFO, logger=gpu.__name__):
        for rows in (1, 3, 4, 1):
            x = torch.randn(rows, 64).bfloat16()
            assert relative(layer.linear(x), F.linear(x, weight).double()) < 2e-2
    assert sorted(key[1] for key in gpu.results) == [1, 4]
    assert {"direct", "unpack", "dense"} == set(next(iter(gpu.results.values())).seconds)
    assert [record.message for record in caplog.records if "32 x 64, 4 rows" in record.message]
    assert set(calls) <= {1, 3, 4}


def test_another_dtype_than_that_of_the_values_is_unpacked():
    weight, base = pruned(32, 64, 0.1, torch.bfloat16)
    x = torch.randn(2, 64)
    assert torch.equal(gpu.gpu_matrix(weight, base).linear(x), F.linear(x, weight.float()))


def test_classes_of_rows():
    assert [gpu.row_class(rows) for rows in (1, 2, 3, 8, 9, 64, 65, 5000)] == [1, 2, 4, 8, 16, 64, 128, 1024]


def test_the_shapes_that_torchs_two_four_supports():
    assert gpu.semi_structured_fits((32, 64), torch.bfloat16)
    assert not gpu.semi_structured_fits((48, 64), torch.bfloat16)
    assert not gpu.semi_structured_fits((32, 96), torch.bfloat16)
    assert not gpu.semi_structured_fits((32, 64), torch.float32)
