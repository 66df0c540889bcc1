"""The report of a run as a page, `report.md`.

Names, recipes and notes come from users and foreign models; all of them are escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from budwood import humanize

Report = Mapping[str, Any]
MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def escape(text: object) -> str:
    """`text` on one line, with all markdown and HTML syntax escaped."""
    return html.escape(MARKS.sub(r"\\\1", " ".join(humanize.printable(text).split())), quote=False)


def code(text: object) -> str:
    """`text` as a code span: the fence longer than any run of backticks inside, pipes safe in tables."""
    plain = " ".join(humanize.printable(text).split()).replace("|", r"\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", plain)), default=0) + 1)
    pad = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its first column text, the others figures; the cells come escaped."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_report(report: Report) -> str:
    """`report.md`: settings, totals, and every matrix."""
    parts = [
        f"# {escape(report['source'])}, pruned with {code(report['method'])}",
        table(("", ""), totals(report)),
        "## How it was made",
        table(("", ""), circumstances(report)),
    ]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in report["notes"])]
    for section in report.get("training", []):
        parts += ["## Training", table(("", ""), training(section))]
    if report["blocks"]:
        kinds = {"attention": "KV groups", "mlp": "neurons"} if any(map(units, report["blocks"])) else {}
        parts += [
            "## Blocks",
            "Output error: the norm of what pruning changed in a block's output, over that output's norm.",
            table(
                ("block", "seconds", "output error", *kinds.values()),
                [
                    (
                        code(block["name"]),
                        figure(block.get("seconds")),
                        humanize.share(block["relative_error"]),
                        *("{:,} of {:,}".format(*units(block).get(kind, (0, 0))) for kind in kinds),
                    )
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


def units(block: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
    """How many units of a block stayed, of how many, by kind; empty where none were removed."""
    return block.get("units") or {}


def rounding(report: Report) -> list[float]:
    """The relative errors of the matrices whose values were rounded."""
    errors = [matrix.get("rounding_error") for matrix in report["linears"].values()]
    return [error for error in errors if error is not None]


def training(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained and what it changed, as rows of name and figure."""
    options = ("move", "rank", "alpha", "steps", "batch", "rate", "reconstruct", "patience", "seed")
    rows = [
        ("options", escape(", ".join(f"{name} {section[name]}" for name in options if name in section))),
        ("trained", f"{section['trained']:,} ({humanize.share(section['trained_share'])} of the weights)"),
    ]
    if blocks := section.get("blocks"):
        pairs = [(block.get("error_after"), block.get("error_before")) for block in blocks]
        errors = [after / before for after, before in pairs if after is not None and before]
        rows.append(("held-out error of a block, of that before", humanize.span(errors) if errors else "0 before"))
        return rows
    if held := section.get("held_out"):
        curve = ", ".join(f"{step}: {loss:.4f}" for step, loss in held)
        rows.append(("held-out loss by step", escape(curve)))
    if held and "best_step" in section:
        rows.append(("kept", f"the state after step {section['best_step']:,}"))
    if losses := section.get("loss"):
        rows.append(("loss of the training windows, first and last", f"{losses[0]:.4f}, {losses[-1]:.4f}"))
    if "seconds" in section:
        rows.append(("seconds", f"{section['seconds']:.1f}"))
    if "state_bytes" in section:
        rows.append(("bytes of the trained tensors with gradients and moments", f"{section['state_bytes']:,}"))
    return rows


def figure(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def totals(report: Report) -> list[tuple[str, str]]:
    """The totals, as rows of name and figure."""
    total = report["totals"]
    rows = [
        ("weights of the model", f"{total['parameters']:,}"),
        ("of them pruned", f"{total['in_scope']:,} ({humanize.share(total['coverage'], 1)})"),
        ("density of the pruned matrices", humanize.share(total["density"])),
        ("bits per pruned weight, index and all", humanize.figure(total["bits_per_weight"])),
        ("bytes of all weights", f"{total['bytes']:,} ({humanize.size(total['bytes'])})"),
        ("share of the dense model", humanize.share(total["bytes"] / total["bytes_dense"], 1)),
    ]
    after = total.get("parameters_after", total["parameters"])
    if after != total["parameters"]:
        left = humanize.share(after / total["parameters"], 1)
        rows.insert(1, ("weights that are left", f"{after:,} ({left})"))
    if total["recovered"] is not None:
        rows.insert(-3, ("recovered beyond 2:4", humanize.share(total["recovered"], 3)))
    return rows


def circumstances(report: Report) -> list[tuple[str, str]]:
    """The settings and the machine, as rows of name and value."""
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
        *([("versions", escape(named(report["versions"])))] if report.get("versions") else []),
        (
            "seconds",
            escape(", ".join(f"{part} {seconds:.1f}" for part, seconds in report["seconds"].items())),
        ),
        ("peak memory", humanize.size(report["peak_memory"])),
    ]
    if report.get("peak_device_memory"):
        rows.append(("peak memory of the GPU", humanize.size(report["peak_device_memory"])))
    return rows


def named(versions: Mapping[str, str | None]) -> str:
    """Packages and their versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def described(data: Mapping[str, Any] | None) -> str:
    """The record of the calibration data in one line."""
    if data is None:
        return "none needed"
    texts = {key: shares(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    return escape(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in texts.items() if value is not None))


def shares(mix: Mapping[str, Any]) -> str:
    """The windows that each text of a mix gave."""
    return " and ".join(f"{count} of {name}" for name, count in mix.items())
