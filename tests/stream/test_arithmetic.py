"""The arithmetic is chosen once, by the user or by timings, and recorded."""

import pytest
import torch

from budwood.errors import UsageError
from budwood.kernels import native
from budwood.stream import arithmetic
from budwood.stream.arithmetic import Arithmetic, choose_arithmetic, known_device
from budwood.stream.trial import tried_once

CPU = torch.device("cpu")
TRIALS = ("faster_dtype", "sparse_product_gain", "blocked_attention_gain")


@pytest.fixture
def trials(monkeypatch):
    """Settable results of the timings, and the names of those that ran."""
    results = {"faster_dtype": (torch.bfloat16, "a note"), "sparse_product_gain": 1.5, "blocked_attention_gain": 1.5}
    ran = []
    for name in TRIALS:
        monkeypatch.setattr(arithmetic, name, lambda *_, name=name: ran.append(name) or results[name])
    monkeypatch.setattr(arithmetic, "multiplies_sparse", lambda *_: True)
    results["ran"] = ran
    return results


@pytest.mark.parametrize("gain", [0.75, 1.05, 1.5])
def test_auto_takes_what_is_clearly_faster(trials, gain):
    trials["sparse_product_gain"] = trials["blocked_attention_gain"] = gain
    faster = gain > 1.1
    chosen = {
        dtype: choose_arithmetic(dtype, "auto", "auto", CPU, 64, published=False)[0] for dtype in arithmetic.TYPES
    }
    assert chosen["float32"] == Arithmetic(torch.float32, faster, faster)
    assert chosen["bfloat16"] == Arithmetic(torch.bfloat16, False, faster)
    assert chosen["float16"] == Arithmetic(torch.float16)


def test_published_figures_are_computed_by_torch(trials):
    assert choose_arithmetic("float32", "auto", "auto", CPU, 64, published=True) == (Arithmetic(), [])
    assert trials["ran"] == []
    asked = choose_arithmetic("float32", "on", "blocked", CPU, 64, published=True)[0]
    assert asked == Arithmetic(torch.float32, True, True)


@pytest.mark.parametrize("sparse", ["on", "off"])
@pytest.mark.parametrize("attention", ["fused", "blocked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explicit_options_are_not_timed(trials, dtype, sparse, attention):
    chosen, notes = choose_arithmetic(dtype, sparse, attention, CPU, 64, published=False)
    assert chosen == Arithmetic(getattr(torch, dtype), sparse == "on", attention == "blocked")
    assert (trials["ran"], notes) == ([], [])


def test_only_auto_options_are_timed(trials):
    chosen, notes = choose_arithmetic("auto", "off", "fused", CPU, 64, published=False)
    assert (chosen, notes, trials["ran"]) == (Arithmetic(torch.bfloat16), ["a note"], ["faster_dtype"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("float64", "auto", "auto"), "compute_dtype is 'float64'; choose one of auto, float32, bfloat16, float16"),
        (("auto", "yes", "auto"), "sparse_products is 'yes'; choose one of auto, on, off"),
        (("auto", "auto", "flash"), "attention is 'flash'; choose one of auto, fused, blocked"),
        (("float16", "off", "blocked"), "attention='blocked' computes in bfloat16 or float32"),
    ],
)
def test_unknown_values_and_unsupported_options_are_refused(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        choose_arithmetic(*options, CPU, 64, published=False)


@pytest.mark.parametrize("dtype", arithmetic.TYPES)
@pytest.mark.parametrize("path", ["reference", "scalar", "auto"])
def test_sparse_products_need_a_kernel(monkeypatch, path, dtype):
    if path == "scalar" and native.file() is None:
        pytest.skip("the native library is not built")
    monkeypatch.setenv(native.VARIABLE, path)
    if native.has(native.SPARSE):
        assert choose_arithmetic(dtype, "on", "fused", CPU, 64, published=False)[0].sparse_products
    else:
        with pytest.raises(UsageError, match="needs a native sparse kernel"):
            choose_arithmetic(dtype, "on", "fused", CPU, 64, published=False)


@pytest.mark.parametrize(("sparse", "attention"), [("on", "auto"), ("auto", "blocked")])
def test_sparse_products_and_blocked_attention_are_for_the_cpu(sparse, attention):
    with pytest.raises(UsageError, match="on cuda"):
        choose_arithmetic("float32", sparse, attention, torch.device("cuda"), 64, published=False)
    assert choose_arithmetic("float32", "auto", "auto", torch.device("cuda"), 64, False) == (Arithmetic(), [])


@pytest.mark.parametrize(
    "chosen", [Arithmetic(), Arithmetic(torch.bfloat16, True, False), Arithmetic(torch.float16, False, True)]
)
def test_a_record_gives_the_arithmetic_again(chosen):
    assert Arithmetic.recorded(chosen.record()) == chosen


def test_a_record_has_the_keys_of_earlier_recipes():
    assert Arithmetic(torch.bfloat16, True).record() == {
        "computed_in": "bfloat16",
        "sparse_products": True,
        "blocked_attention": False,
    }
    assert Arithmetic.recorded({"computed_in": "float32"}) == Arithmetic()


def test_trials_draw_none_of_the_callers_random_numbers(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "auto")
    before = torch.get_rng_state()
    assert arithmetic.faster_dtype(CPU, 16)[0] in (torch.float32, torch.bfloat16)
    assert arithmetic.blocked_attention_gain(torch.float32, tokens=16) > 0
    if arithmetic.multiplies_sparse(torch.float32, CPU):
        assert arithmetic.sparse_product_gain(width=64, rows=32) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_runs_once_for_its_arguments_the_threads_and_the_kernels(monkeypatch):
    ran, threads = [], torch.get_num_threads()
    trial = tried_once(lambda width, rows=1: ran.append((width, rows)) or len(ran))
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert [trial(8), trial(8), trial(8, rows=2), trial(8, rows=2), trial(9)] == [1, 1, 2, 2, 3]
    try:
        torch.set_num_threads(threads + 1)
        assert [trial(9), trial(8)] == [4, 5]
    finally:
        torch.set_num_threads(threads)
    assert trial(8) == 1
    if native.file():
        monkeypatch.setenv(native.VARIABLE, "scalar")
        assert trial(8) == 6


def test_the_default_device_is_a_gpu_where_there_is_one(monkeypatch):
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert known_device(None).type == known_device("auto").type == there
    assert known_device("cpu") == CPU
    with pytest.raises(UsageError, match="device 'abacus' cannot be used here"):
        known_device("abacus")
