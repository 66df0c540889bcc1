"""Folders to report on, made from plain JSON: what prune, evaluate, bench, retrain and compare write, in small."""

import json
import math
from pathlib import Path

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MACHINE = {"processor": "AMD EPYC", "instructions": "AVX2", "cores": 2, "threads": 2, "memory": 2**34}
VERSIONS = {"python": "3.11.2", "budwood": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"}
CONDITIONS = {
    "dtype": "float32",
    "device": "cpu",
    "machine": MACHINE,
    "versions": VERSIONS,
    "created": "2026-01-02T03:04:05+00:00",
}
TEXT = {
    "name": "wikitext2",
    "data": "wiki.test.raw",
    "variant": "plain",
    "bos": "auto",
    "seed": None,
    "windows": 4,
    "seq_length": 2048,
    "sha256": "ab" * 32,
}


def report(method="wrp(alpha=0.25)", *, blocks=6, density=0.5142, spread=0.01, units=False, name=None, **sections):
    """`report.json` of a pruned folder."""
    linears = {}
    for block in range(blocks):
        for place, kind in enumerate(KINDS):
            share = density + spread * math.sin(1 + block + 2 * place)
            linears[f"model.layers.{block}.{kind}"] = {
                "shape": [64, 64],
                "format": "bitmask",
                "nonzeros": round(4096 * share),
                "density": share,
                "recovered": share - 0.5,
                "rounding_error": None,
                "change": 0.3 + 0.02 * place + 0.01 * block,
                "x4": [20, 200, 580, 190, 34],
                "bytes": 4300,
            }
    kept = {"attention": [2, 3], "mlp": [900, 1536]}
    return {
        "budwood": "0.1.0",
        "source": name or "SmolLM2-135M",
        "method": method,
        "created": "2026-01-02T03:04:05+00:00",
        "machine": MACHINE,
        "versions": VERSIONS,
        "data": {"data": "sotu:1947-1999", "num_samples": 8, "seq_length": 512, "sampling": "random", "seed": 0},
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "format": "auto",
        "needs_budwood": True,
        "totals": {
            "parameters": 134_515_008,
            "in_scope": 106_168_320,
            "coverage": 0.789,
            "density": density,
            "recovered": 0.0142,
            "recovered_unweighted": 0.0144,
            "bytes": 179_141_110,
            "bytes_dense": 269_030_016,
            "bits_per_weight": 9.227,
        },
        "blocks": [
            {
                "name": f"model.layers.{block}",
                "seconds": 1.0,
                "relative_error": 0.05 + 0.02 * block,
                "units": {
                    key: [stayed - 100 * (block % 2) * (stayed > 100), all] for key, (stayed, all) in kept.items()
                }
                if units
                else {},
            }
            for block in range(blocks)
        ],
        "linears": linears,
        "seconds": {"blocks": 20.0, "total": 21.5},
        "peak_memory": 1_450_000_000,
        "notes": ["computing in float32: bfloat16 is at least 5 times slower here"],
        **sections,
    }


def speed():
    spread = {"median": 0.058, "low": 0.046, "high": 0.062}
    dense = {"median": 0.067, "low": 0.059, "high": 0.073}
    matrices = [
        {
            "shape": list(shape),
            "rows": rows,
            "seconds": {
                "pruned": {"median": 1e-4 * rows, "low": 0.8e-4 * rows, "high": 1.3e-4 * rows},
                "dense": {"median": 1.6e-4 * rows / rows**0.1, "low": 1e-4 * rows, "high": 2e-4 * rows},
            },
            "times_dense": 1.6,
        }
        for shape in ((192, 576), (576, 576), (1536, 576), (576, 1536))
        for rows in (1, 8, 64, 512)
    ]
    return {
        "machine": MACHINE,
        "versions": VERSIONS,
        "kernels": "native, avx2 path",
        "dtype": "bfloat16",
        "matrices": matrices,
        "model": {
            "prompt": 128,
            "new_tokens": 32,
            "pruned": {"prefill_tokens_per_second": 317, "decode_tokens_per_second": 17, "decode_seconds": spread},
            "dense": {"prefill_tokens_per_second": 67, "decode_tokens_per_second": 14, "decode_seconds": dense},
            "decode_times_dense": 1.16,
            "prefill_times_dense": 4.7,
        },
        "peak_memory": 10**9,
        "warnings": [],
    }


def results(perplexity=30.5, dense=20.7):
    """The section `results`: one record of each kind."""
    common = {"model": "out", "text": TEXT, "conditions": CONDITIONS, "seconds": 3.0}
    losses = [math.log(perplexity)] * 4
    task = {"task": "piqa", "version": "1.0", "shots": 0, "metric": "acc_norm", "items": 100, "limit": 100}
    return [
        {"kind": "perplexity", "perplexity": perplexity, "error": 0.8, "losses": losses, **common},
        {
            "kind": "divergence",
            "against": "dense",
            "perplexity": perplexity,
            "dense_perplexity": dense,
            "ln_ratio": math.log(perplexity / dense),
            "ln_ratio_error": 0.01,
            "same_top": 0.71,
            "kl_mean": 0.41,
            "kl_median": 0.2,
            "kl_999": 7.1,
            **common,
        },
        {"kind": "repetition", "share": 0.12, "error": 0.02, **common},
        {"kind": "task", "value": 0.61, "error": 0.03, "rows": "a folder", "conditions": CONDITIONS, **task},
        {
            "kind": "pair",
            "against": "dense",
            "subject": "mean loss on wikitext2",
            "difference": 0.38,
            "low": 0.35,
            "high": 0.41,
            "p": 0.001,
            "better": 0,
            "worse": 4,
            "test": "bootstrap over windows",
            "conditions": CONDITIONS,
        },
    ]


TRAINING = [
    {
        "move": "biases+norms+lora",
        "steps": 100,
        "trained": 1000,
        "trained_share": 0.01,
        "best_step": 80,
        "held_out": [[step, 3.6 - 0.3 * step / 100 + (0.02 if step == 100 else 0)] for step in range(0, 101, 20)],
        "loss": [3.7 - 0.4 * step / 50 + 0.05 * (step % 3) for step in range(50)],
        "steps_per_loss": 2,
        "seconds": 30.0,
        "state_bytes": 12000,
    }
]


def pruned_folder(folder: Path, **changes) -> Path:
    """A folder with only a report, complete in its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    made = report(results=results(), speed=speed(), training=TRAINING, units=True, **changes)
    (folder / "report.json").write_text(json.dumps(made))
    return folder


def comparison_folder(folder: Path) -> Path:
    """`results.json`: a grid of alphas, other methods, dense and quantised rows, a failed run, published figures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row("dense", "dense", 20.7, 16.0, kind="dense")]
    for alpha, found in ((0, 120), (0.1, 101), (0.2, 80), (0.25, 66), (0.3, 55), (0.4, 41)):
        density = alpha**3 - alpha**4 / 2
        method = f"wrp(alpha={alpha})"
        rows.append(row(f"wrp alpha {alpha}", "WRP", found, 9 + 16 * density, method, {"alpha": alpha}, density))
    rows += [
        row("Wanda 2:4", "Wanda", 122, 9.0, 'wanda("2:4")'),
        row("Wanda 50 %", "Wanda", 45, 9.0, 'wanda("50%")'),
        row("SparseGPT 50 %", "SparseGPT", 39, 9.0, 'sparsegpt("50%")'),
        row("graft 9.75", "graft", 30.7, 9.75, "graft(bits=9.75)"),
        row("graft 9", "graft", 29.2, 9.0, 'graft(bits=9.0, pattern="free")'),
        row("FLAP 25 %", "FLAP", 70, 12.0, "flap(drop=0.25)", units=True),
        row("int8", "int8", 20.8, 8.13, "rtn(bits=8)", kind="quantised"),
        row("int4", "int4", 36.5, 4.13, "rtn(bits=4)", kind="quantised"),
        row("magnitude 2:4", "magnitude", 2141, 9.0, 'magnitude("2:4")'),
    ]
    broken = row("gblm", "gblm", 1, 9.0, "gblm()")
    rows.append(
        broken | {"status": "failed", "error": "the disk is full", "figures": {}, "results": [], "report": None}
    )
    published = [
        {
            "table": "WRP, Figure 3",
            "model": "LLaMA-2-7B",
            "method": "WRP, alpha 0.25",
            "row": "WRP",
            "source": "smollm2",
            "settings": {"alpha": 0.25},
            "figure": "perplexity wikitext2",
            "value": 8.69,
            "conditions": "2,048 tokens, RedPajama",
        }
    ]
    record = {
        "schema": 1,
        "budwood": "0.1.0",
        "title": "WRP on SmolLM2",
        "description": "Alpha, blocks and other methods.",
        "recipe": {},
        "sources": {},
        "created": "2026-01-02T03:04:05+00:00",
        "complete": False,
        "columns": ["alpha"],
        "rows": rows,
        "published": published,
        "notes": [],
    }
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def row(label, family, perplexity, bits, method=None, settings=None, density=0.0, *, kind="pruned", units=False):
    change = math.log(perplexity / 20.7)
    figures = {
        "perplexity wikitext2": perplexity,
        "perplexity c4": 1.5 * perplexity,
        "D wikitext2": change,
        "D": change,
        "KL wikitext2": 0.9 * change,
        "accuracy piqa": 0.7 - 0.05 * change,
        "accuracy": 0.6 - 0.05 * change,
        "bits per weight": bits,
        "density": bits / 16,
        "recovered": density,
        "bytes": 269_030_016 * bits / 16,
        "share of dense": bits / 16,
        "decode times dense": 16 / bits,
        "seconds": 40.0,
    }
    uneven = 0.02 if family == "graft" else 0.0
    return {
        "name": label.replace(" ", "-"),
        "row": family,
        "label": label,
        "kind": kind,
        "source": "smollm2",
        "method": method,
        "settings": settings or {},
        "draw": 0,
        "status": "done",
        "error": None,
        "seconds": {"prune": 40.0},
        "figures": figures,
        "report": report(str(method), density=0.5 + density, spread=uneven, units=units) if kind == "pruned" else None,
        "results": results(perplexity) if kind != "dense" else results(20.7)[:1],
        "speed": speed() if label == "graft 9" else None,
        "machine": MACHINE,
        "folder": None,
    }
