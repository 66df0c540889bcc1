"""The report of a run for people: `report.md`, and the model card `README.md` of the written folder.

Names, recipes and notes come from users and foreign models, so nothing of them reaches the page as markup.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from budwood import humanize

Report = Mapping[str, Any]
BUDWOOD = "./budwood  # the source folder of budwood"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escape(text: object) -> str:
    """`text` on one line, with everything that markdown or HTML would act on made plain."""
    return html.escape(MARKS.sub(r"\\\1", " ".join(str(text).split())), quote=False)


def code(text: object) -> str:
    """`text` as a code span: the fence longer than any run of backticks inside, pipes safe in tables."""
    plain = " ".join(str(text).split()).replace("|", r"\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", plain)), default=0) + 1)
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its first column text, the others figures; the cells come escaped."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_report(report: Report) -> str:
    """`report.md`: what was done, what came out, matrix by matrix."""
    parts = [
        f"# {escape(report['source'])}, pruned with {code(report['method'])}",
        table(("", ""), totals(report)),
        "## How it was made",
        table(("", ""), circumstances(report)),
    ]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in report["notes"])]
    if report["blocks"]:
        parts += [
            "## Blocks",
            "Output error: the norm of what pruning changed in a block's output, over that output's norm.",
            table(
                ("block", "seconds", "output error"),
                [
                    (code(block["name"]), figure(block["seconds"]), humanize.share(block["relative_error"]))
                    for block in report["blocks"]
                ],
            ),
        ]
    rounded = bool(rounding(report))
    parts += [
        "## Matrices",
        *(["Rounding error: the norm of what rounding changed in a pruned matrix, over its norm."] if rounded else []),
        table(
            ("matrix", "shape", "format", "density", "recovered", *(["rounding error"] if rounded else []), "bytes"),
            [
                (
                    code(name),
                    humanize.shape(matrix["shape"]),
                    matrix["format"],
                    humanize.share(matrix["density"]),
                    humanize.share(matrix["recovered"]),
                    *([humanize.share(matrix.get("rounding_error"))] if rounded else []),
                    f"{matrix['bytes']:,}",
                )
                for name, matrix in report["linears"].items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def rounding(report: Report) -> list[float]:
    """The relative errors of the matrices whose values were rounded."""
    errors = [matrix.get("rounding_error") for matrix in report["linears"].values()]
    return [error for error in errors if error is not None]


def figure(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def totals(report: Report) -> list[tuple[str, str]]:
    """What came out, as rows of name and figure."""
    total = report["totals"]
    rows = [
        ("weights of the model", f"{total['parameters']:,}"),
        ("of them pruned", f"{total['in_scope']:,} ({humanize.share(total['coverage'], 1)})"),
        ("density of the pruned matrices", humanize.share(total["density"])),
        ("bits per pruned weight, index and all", humanize.figure(total["bits_per_weight"])),
        ("bytes of all weights", f"{total['bytes']:,} ({humanize.size(total['bytes'])})"),
        ("share of the dense model", humanize.share(total["bytes"] / total["bytes_dense"], 1)),
    ]
    if total["recovered"] is not None:
        rows.insert(3, ("recovered beyond 2:4", humanize.share(total["recovered"], 3)))
    return rows


def circumstances(report: Report) -> list[tuple[str, str]]:
    """What the figures must be read with."""
    rows = [
        ("budwood", escape(report["budwood"])),
        ("made", escape(report["created"])),
        ("method", code(report["method"])),
        ("calibration", described(report["data"])),
        ("stored as", escape(f"{report['dtype']}, {report['format']}")),
        ("computed in", escape(report["compute_dtype"])),
        (
            "machine",
            escape(", ".join(f"{key} {value}" for key, value in report["machine"].items() if value is not None)),
        ),
        (
            "seconds",
            escape(", ".join(f"{part} {seconds:.1f}" for part, seconds in report["seconds"].items())),
        ),
        ("peak memory", humanize.size(report["peak_memory"])),
    ]
    return rows


def described(data: Mapping[str, Any] | None) -> str:
    """The record of a text in one line."""
    if data is None:
        return "none needed"
    return escape(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in data.items() if value is not None))


def render_card(report: Report, base_model: str | None, license: str | None, architecture: str | None) -> str:
    """The model card in the hub's manner.

    base_model: a name on the hub, or None where the source was a local folder. license: the base model's,
    as the hub spells it, or None. architecture: the class that loads it, such as LlamaForCausalLM.
    """
    packed = report["format"] != "dense"
    base_model = base_model if base_model and HUB_NAME.fullmatch(base_model) else None
    name = base_model or PurePath(report["source"]).name
    loading = "import budwood  # lets transformers read the packed weights\n" if packed else ""
    parts = [
        front_matter(base_model, license),
        f"# {escape(name)}, pruned with {code(report['method'])}",
        f"A {escape(architecture or 'language model')} whose matrices were pruned by "
        f"budwood {escape(report['budwood'])}. Embeddings and head are dense.",
        "## Load it",
        f"```sh\npip install {BUDWOOD if packed else 'transformers torch'}\n```",
        "```python\n"
        f"{loading}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n```',
        "## What it is",
        table(("", ""), totals(report)),
        "## What was measured",
        measured(report, packed),
        "## How it was made",
        table(("", ""), circumstances(report)),
        "Matrix by matrix: `report.md`; for machines: `report.json`; to make it again: `recipe.json`.",
        "## Licence",
        f"That of the base model{f' ({escape(license)})' if license else '; the source folder names none'}.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(base_model: str | None, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=["budwood", "pruned", "sparse"],
    )
    return f"---\n{data.to_yaml()}\n---"


def measured(report: Report, packed: bool) -> str:
    """What is known of quality and speed, and plainly what is not."""
    errors = [block["relative_error"] for block in report["blocks"] if block["relative_error"] is not None]
    counted = humanize.share(report["totals"]["bytes"] / report["totals"]["bytes_dense"], 1)
    error = humanize.span(errors) if errors else "not measured"
    speed = " A packed matrix is unpacked whenever it multiplies: that saves bytes, not time." if packed else ""
    rounded = rounding(report)
    return "\n".join(
        [
            f"- Output error of a block: {error}.",
            *([f"- Rounding error of a matrix: {humanize.span(rounded)}."] if rounded else []),
            f"- Bytes, counted: {counted} of the dense model.",
            "- Perplexity: not measured when this card was written; `budwood evaluate` measures it.",
            f"- Speed: not measured.{speed}",
        ]
    )


SPEED = "## Speed"


def render_speed(speed: Mapping[str, Any]) -> str:
    """The section of a model card that `budwood bench` fills in."""
    machine, model = speed["machine"], speed["model"]
    lines = [
        f"{escape(machine['processor'])} ({escape(machine['instructions'])}), {machine['threads']} threads, "
        f"{escape(speed['dtype'])}; kernels: {escape(speed['kernels'])}. Medians of rounds in turns, cold weights."
    ]
    rows = [
        (
            f"{found['shape'][0]} x {found['shape'][1]}, {found['rows']} rows",
            f"{found['seconds']['pruned']['median'] * 1e6:.0f}",
            f"{found['seconds']['dense']['median'] * 1e6:.0f}",
            f"{found['times_dense']:.2f}",
        )
        for found in speed["matrices"]
    ]
    lines.append(table(("matrix", "pruned, us", "dense, us", "times as fast"), rows))
    for name, words in (("pruned", "This model"), ("dense", "Dense")):
        if name in model:
            lines.append(
                f"{words}: {model[name]['decode_tokens_per_second']:.1f} tokens a second generated, "
                f"{model[name]['prefill_tokens_per_second']:.0f} read."
            )
    lines += [f"Note: {escape(sentence)}." for sentence in speed["warnings"]]
    return "\n\n".join(lines)


def with_speed(card: str, speed: Mapping[str, Any]) -> str:
    """The model card with its speed section put in, or put anew."""
    before, found, after = card.partition(f"\n{SPEED}\n")
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    return f"{before.rstrip()}\n\n{SPEED}\n\n{render_speed(speed)}\n{rest}"
