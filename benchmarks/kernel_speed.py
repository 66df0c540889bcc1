"""The kernels against torch, on masks chosen by WRP: one table for each number of rows.

    python benchmarks/kernel_speed.py MODEL [--threads 2] [--rows 1,2,4,8,64,512] [--onnx]

MODEL is a folder that `budwood prune` wrote with WRP. Weights have the layout that a loaded model has. Its matrices are
timed, and larger ones tiled from them with the same statistics. Every round times each variant once, with weights
outside the cache; `share` is bytes read per second relative to plain reading in the same round. Medians. --onnx: also
onnxruntime's dense float32 product, its weights packed in advance (needs the packages onnx and onnxruntime).
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from budwood.benchmarking import COLD
from budwood.checkpoints.loading import load
from budwood.environment import machine
from budwood.formats import FORMATS, pack_as
from budwood.kernels import dispatch, native, tiles
from budwood.kernels.arena import Arena
from budwood.kernels.head import multiply
from budwood.kernels.linear import SparseLinear
from budwood.kernels.native import BY_ROWS, FEW_ROWS, PANELS, SPARSE, TILES
from budwood.kernels.native_matrix import NativeMatrix, native_matrix
from budwood.timing import interleaved, ratio

LARGE = ((2048, 2048), (8192, 2048), (4096, 4096))  # [out, in]
CSR_COPIES = 4  # 6 bytes per weight each


def tiled(weight: Tensor, out: int, width: int) -> Tensor:
    """The matrix repeated to `[out, width]`, its rows and groups shuffled so that nothing repeats exactly."""
    rows, groups = weight.shape[0], weight.shape[1] // 4
    across = weight.view(rows, groups, 4)
    generator = torch.Generator().manual_seed(out + width)
    row = torch.randint(rows, (out, 1), generator=generator)
    group = torch.cat([torch.randperm(groups, generator=generator) for _ in range(-(-width // weight.shape[1]))])
    return across[row, group[: width // 4]].reshape(out, width)


def only_two_four(weight: Tensor) -> Tensor:
    """Without the recovered weights."""
    tensors = pack_as("two_four_compact", weight)
    return FORMATS["two_four"].unpack(tensors, (weight.shape[0], weight.shape[1]))


def shuffled(weight: Tensor) -> Tensor:
    """The same weights with columns in another order: a mask of the same density without a pattern."""
    generator = torch.Generator().manual_seed(weight.shape[1])
    return weight[:, torch.randperm(weight.shape[1], generator=generator)].contiguous()


class Case:
    """One shape: copies of its matrices in every format, more than the cache holds."""

    def __init__(self, weights: list[Tensor], threads: int):
        self.shape = (weights[0].shape[0], weights[0].shape[1])
        self.threads, self.weights = threads, weights
        size = 2 * weights[0].numel()
        self.copies = max(2, -(-COLD // size))
        self.dense = [weights[i % len(weights)].clone() for i in range(self.copies)]
        self.wide = [weights[i % len(weights)].float() for i in range(max(2, -(-COLD // (2 * size))))]
        alone, free = [only_two_four(weight) for weight in weights], [shuffled(weight) for weight in weights]
        self.packed = {
            "2:4 + recovered": self.forms("bitmask", weights),
            "2:4 alone": self.forms("two_four", alone),
            "free": self.forms("bitmask", free),
        }
        for values in ("int8", "int4"):
            self.packed |= {
                values: self.forms(f"two_four_compact_{values}", weights),
                f"{values}, recovered too": self.forms(f"bitmask_{values}", weights),
                f"{values}, 2:4 alone": self.forms(f"two_four_{values}", alone),
                f"{values}, free": self.forms(f"bitmask_{values}", free),
            }
        self.packed["int4, unpruned"] = self.forms("dense_int4", weights)
        self.memory = torch.zeros(2 * COLD, dtype=torch.uint8)

    def forms(self, format: str, weights: list[Tensor]) -> list[NativeMatrix]:
        """In the layout that a loaded layer has: in tiles on AVX2, unless they would take too much memory."""
        matrices = []
        kinds = [FORMATS[format].nearest(weight) for weight in weights]
        size = sum(tiles.room(format, kind.values()) for kind in kinds)
        arena = Arena(size * (1 + self.copies // len(kinds)))
        for i in range(self.copies):
            kind = kinds[i % len(kinds)]
            in_tiles = tiles.pack(format, self.shape, kind, arena)
            if in_tiles is not None:
                matrices.append(in_tiles.matrix)
                continue
            tensors = {suffix: arena.place(tensor) for suffix, tensor in kind.items()}
            matrix = native_matrix(format, self.shape, tensors)
            assert matrix is not None, format
            matrices.append(matrix)
        return matrices

    def layouts(self) -> str:
        """Which layout each format has."""
        named = {name: "tiles" if forms[0].matrix.coding == TILES else "file" for name, forms in self.packed.items()}
        return ", ".join(f"{name} {layout}" for name, layout in named.items())

    def variants(self, rows: int, onnx: bool = False) -> dict[str, Callable[[int], object]]:
        x = torch.randn(rows, self.shape[1]).bfloat16()
        wide = x.float()
        found: dict[str, Callable[[int], object]] = {
            "torch bf16": lambda turn: F.linear(x, self.dense[turn % self.copies]),
            "torch fp32": lambda turn: F.linear(wide, self.wide[turn % len(self.wide)]),
        }
        for name, forms in self.packed.items():
            kernel = BY_ROWS if rows <= native.MAX_FEW_ROWS else self.faster(forms, x)
            found[name] = lambda turn, forms=forms, kernel=kernel: forms[turn % self.copies].linear(x, None, kernel)
        # Not the copy that the bfloat16 product of this round has left in the cache.
        forms, away = self.packed["2:4 + recovered"], self.copies // 2
        kernel = FEW_ROWS if rows <= native.MAX_FEW_ROWS else self.faster(forms, wide)
        found["2:4 + recovered, fp32"] = lambda turn: forms[(turn + away) % self.copies].linear(wide, None, kernel)
        if rows <= 8:
            found["dense, ours"] = lambda turn: multiply(self.dense[turn % self.copies], x, None)
        if onnx:
            products = [onnx_product(weight, self.threads) for weight in self.wide[:4]]
            found["onnxruntime fp32"] = lambda turn: products[turn % len(products)](wide)
        if rows == 1:
            sparse = [weight.to_sparse_csr() for weight in self.wide[:CSR_COPIES]]
            column = wide.T.contiguous()
            found["torch CSR fp32"] = lambda turn: sparse[turn % len(sparse)] @ column
            library, size = native.library(), self.bytes("2:4 + recovered")
            assert library is not None
            places = max(1, 2 * COLD // size - 1)
            start = self.memory.data_ptr()
            found["read"] = lambda turn: library.budwood_read(start + turn % places * size, size, self.threads)
        return found

    def faster(self, forms: list[NativeMatrix], x: Tensor) -> int:
        """Sparse or in panels: what dispatch would measure at load."""
        kernels = [kernel for kernel in (SPARSE, PANELS) if forms[0].linear(x, None, kernel) is not None]
        products = {kernel: partial(forms[0].linear, x, None, kernel) for kernel in kernels}
        return dispatch.fastest(products).kernel if products else FEW_ROWS

    def bytes(self, name: str) -> int:
        """Bytes that a product reads: tiles; or values, positions, row offsets, any scales and recovered weights."""
        return sum(tensor.nbytes for tensor in self.packed[name][0].held)


def onnx_product(weight: Tensor, threads: int) -> Callable[[Tensor], object]:
    """x -> x weightᵀ by onnxruntime, which packs its constants when a session opens."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])
        for name, size in (("x", weight.shape[1]), ("y", weight.shape[0]))
    )
    constant = numpy_helper.from_array(weight.T.contiguous().numpy(), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [constant])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning threads slow down what runs next
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda input: session.run(None, {"x": input.numpy()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default="1,2,4,8,64,512")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--small", action="store_true", help="the model's own shapes only")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(f"{machine()}\n{native.why()}")

    layers = [
        module for module in load(asked.model, dtype=torch.bfloat16).modules() if isinstance(module, SparseLinear)
    ]
    own: dict[tuple[int, int], list[Tensor]] = {}
    for layer in layers:
        own.setdefault(layer.shape, []).append(layer.unpack())
    widest = max(own, key=lambda shape: shape[0] * shape[1])
    cases = {shape: weights for shape, weights in own.items() if shape[0] * shape[1] >= 576 * 576}
    if not asked.small:
        cases |= {shape: [tiled(own[widest][i], *shape) for i in range(2)] for shape in LARGE}
    for rows in map(int, asked.rows.split(",")):
        print(f"\n{rows} rows, {asked.threads} threads, microseconds")
        for shape, weights in cases.items():
            case = Case(weights, asked.threads)
            print(f"layouts: {case.layouts()}")
            rounds = asked.rounds if rows <= 8 else max(7, asked.rounds // 4)
            times = interleaved(case.variants(rows, asked.onnx), rounds)
            medians = ", ".join(f"{name} {statistics.median(found) * 1e6:.0f}" for name, found in times.items())
            print(f"{shape[1]} -> {shape[0]}: {medians}")
            ours = times["2:4 + recovered"]
            line = [f"x {name} {ratio(times[name], ours):.2f}" for name in ("torch bf16", "torch fp32")]
            line.append(f"recovered +{100 * (ratio(ours, times['2:4 alone']) - 1):.0f} %")
            for name in list(times)[list(times).index("free") : list(times).index("int4, unpruned") + 1]:
                line.append(f"{name} x torch bf16 {ratio(times['torch bf16'], times[name]):.2f}")
            for name in [name for name in times if name.startswith("int8")]:
                other = name.replace("int8", "int4")
                line.append(f"{other} x {name} {ratio(times[name], times[other]):.2f}")
            line.append(f"fp32 x torch fp32 {ratio(times['torch fp32'], times['2:4 + recovered, fp32']):.2f}")
            if asked.onnx:
                gain = ratio(times["onnxruntime fp32"], times["2:4 + recovered, fp32"])
                line.append(f"fp32 x onnxruntime fp32 {gain:.2f}")
            if "torch CSR fp32" in times:
                line.append(f"x torch CSR fp32 {ratio(times['torch CSR fp32'], ours):.1f}")
            if "dense, ours" in times:
                line.append(f"x own dense {ratio(times['dense, ours'], ours):.2f}")
            if "read" in times:
                line.append(f"share {ratio(times['read'], ours):.2f}")
                line.append(f"{case.bytes('2:4 + recovered') / statistics.median(ours) / 1e9:.1f} GB/s")
            print("    " + ", ".join(line), flush=True)


if __name__ == "__main__":
    main()
