"""Products of pruned matrices on a GPU against torch's dense bf16 product, and a decoding step of a pruned model.

    python benchmarks/gpu_speed.py [--shapes 4096x4096 ...] [--rows 1 2 4 8 16 64 2048] [--model PRUNED DENSE]

Cold weights (more copies, used in turns, than the cache holds), CUDA graphs, so that launch overhead is excluded; all
kernels in turns in each round; medians. *Share* is bytes read per second relative to a plain sum over a large tensor. A
decoding step of a model, one token and a static cache, is timed in a graph and launched from Python.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.kernels import gpu
from budwood.kernels.gpu_layouts import TwoFourLayout, pack_two_four

COLD = 250_000_000  # least bytes of all copies of a matrix
SHARE = 0.015  # of recovered weights
Timed = Callable[[], float]


def captured(calls: list[Callable[[], Tensor]]) -> Timed:
    """Seconds per call of all of them in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def run() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / len(calls)

    return run


def interleaved(runs: dict[str, Timed], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, each once a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            seconds = run()
            if turn >= 2:
                times[name].append(seconds)
    return {name: median(taken) for name, taken in times.items()}


def copies(layout: TwoFourLayout, number: int) -> list[TwoFourLayout]:
    """The layout and clones of it, `number` in all."""
    tensors = [field.name for field in dataclasses.fields(layout) if isinstance(getattr(layout, field.name), Tensor)]
    clones = [
        dataclasses.replace(layout, **{name: getattr(layout, name).clone() for name in tensors})
        for _ in range(number - 1)
    ]
    return [layout, *clones]


def matrices(out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 matrix with recovered weights, the mask of its 2:4 part, and an unstructured matrix with 50 % zeros."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(out, width, generator=generator, device="cuda").bfloat16()
    chance = torch.rand(out, width, generator=generator, device="cuda")
    base = (chance.view(-1, 4).argsort(1).argsort(1) < 2).view(out, width)
    recovered = torch.rand(out, width, generator=generator, device="cuda") < 2 * SHARE
    return weight.masked_fill(~(base | recovered), 0.0), base, weight.masked_fill(chance < 0.5, 0.0)


def products(out: int, width: int, many: list[int], reading: float) -> None:
    """One table row for every number of rows of x."""
    weight, base, unstructured = matrices(out, width)
    packed, found = pack_two_four(weight, base), pack_two_four(unstructured)
    number = max(1, -(-COLD // packed.nbytes))
    recovered = [gpu.GpuMatrix(layout) for layout in copies(packed, number)]
    others = [gpu.GpuMatrix(layout) for layout in copies(found, number)]
    dense = [weight.clone() for _ in range(number)]
    torch.cuda.synchronize()
    for rows in many:
        x = torch.randn(rows, width, device="cuda").bfloat16()
        runs = {"dense": captured([partial(F.linear, x, w) for w in dense])}
        for kind, packed_matrices, dense_weight in (
            ("2:4 +", recovered, weight),
            ("unstructured", others, unstructured),
        ):
            for name in packed_matrices[0].candidates(rows):
                if (
                    name == "semi-structured"
                ):  # its product of the recovered weights, in torch's CSR, takes milliseconds
                    continue
                kernels = [matrix.candidates(rows)[name] for matrix in packed_matrices]
                expected = x.double() @ dense_weight.double().T
                error = (kernels[0](x, None).double() - expected).norm() / expected.norm()
                assert error < 5e-3, f"{kind} {name} has an error of {error:.1e}"  # rounded to bf16
                runs[f"{kind} {name}"] = captured([partial(kernel, x, None) for kernel in kernels])
        seconds = interleaved(runs)
        slow = seconds.pop("dense")
        for name, fast in seconds.items():
            size = (packed if name.startswith("2:4") else found).nbytes
            print(
                f"| {out} x {width} | {rows} | {name} | {slow * 1e6:.1f} | {fast * 1e6:.1f} | {slow / fast:.2f} "
                f"| {size / fast / reading:.2f} |",
                flush=True,
            )


def reading_speed() -> float:
    """Bytes per second of a sum over 2 GB."""
    large = torch.ones(1 << 28, dtype=torch.int64, device="cuda")
    return large.nbytes / interleaved({"sum": captured([lambda: large.sum()])})["sum"]


def launched(call: Callable[[], Tensor]) -> Timed:
    """Seconds of a call launched from Python, including the launch overhead."""

    def run() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def step(folder: str) -> tuple[Timed, Timed, float]:
    """A greedy decoding step in a graph, the same launched from Python, and the model's bytes on the device."""
    from transformers import AutoModelForCausalLM, StaticCache

    import budwood  # noqa: F401 : registers the loader of pruned folders

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    used = float(sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
    cache = StaticCache(config=model.config, max_cache_len=256)
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    place = torch.tensor([[100]], device="cuda")

    def once() -> Tensor:
        with torch.no_grad():
            return model(token, position_ids=place, past_key_values=cache, use_cache=True).logits

    for _ in range(3):
        once()  # the kernels are timed before the capture
    return captured([once]), launched(once), used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="*", default=["2048x2048", "4096x4096", "4096x11008", "11008x4096", "8192x28672"]
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 2048])
    parser.add_argument("--model", nargs=2, metavar=("PRUNED", "DENSE"))
    asked = parser.parse_args()
    if fault := gpu.why_not():
        raise SystemExit(fault)
    torch.manual_seed(0)
    reading = reading_speed()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, plain read {reading / 1e12:.2f} TB/s\n")
    print("| matrix | rows | kernel | dense, us | us | times dense | share |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for shape in asked.shapes:
        out, width = map(int, shape.split("x"))
        products(out, width, asked.rows if out * width < 1e8 else asked.rows[:1], reading)
        torch.cuda.empty_cache()
    if asked.model:
        steps = {name: step(folder) for name, folder in zip(("pruned", "dense"), asked.model, strict=True)}
        for how, place in (("in a graph", 0), ("launched from Python", 1)):
            seconds = interleaved({name: parts[place] for name, parts in steps.items()})
            for name, (_, _, used) in steps.items():
                print(
                    f"a step of the {name} model, {how}: {seconds[name] * 1e3:.3f} ms; {used / 1e9:.2f} GB of weights"
                )
            print(f"{seconds['dense'] / seconds['pruned']:.2f} times dense")
        for key, result in gpu.results.items():
            print(key, result.winner, {name: f"{taken * 1e6:.0f} us" for name, taken in result.seconds.items()})


if __name__ == "__main__":
    main()
