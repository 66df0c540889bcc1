"""The model card `README.md` of a written folder, in the hub's form. Foreign text is escaped as in `report.md`."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from budwood import humanize
from budwood.reports.markdown import Report, circumstances, code, escape, rounding, table, totals, training

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LOADING = (
    "Nothing has to be imported: transformers finds budwood once it is installed. Without it, loading ends with an "
    "error that names the missing weights file. `budwood export THIS_FOLDER DENSE` writes a dense folder that loads "
    "anywhere."
)


def render_card(report: Report, base_model: str | None, license: str | None, architecture: str | None) -> str:
    """The model card of a pruned folder.

    base_model: a name on the hub, or None where the source was a local folder. license: the base model's, as the hub
    spells it, or None. architecture: the class that loads it, such as LlamaForCausalLM.
    """
    needs_budwood = report["needs_budwood"] if "needs_budwood" in report else report["format"] != "dense"
    base_model = base_model if base_model and HUB_NAME.fullmatch(base_model) else None
    name = base_model or PurePath(report["source"]).name
    version = report["budwood"] or "0.1.0"
    install = f'"budwood>={version}" transformers torch' if needs_budwood else "transformers torch"
    parts = [
        front_matter(base_model, license),
        f"# {escape(name)}, pruned with {code(report['method'])}",
        f"A {escape(architecture or 'language model')} whose matrices were pruned by "
        f"budwood {escape(report['budwood'])}. Embeddings and head are dense.",
        "## Load it",
        f"```sh\npip install {install}\n```",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n```',
        *([LOADING] if needs_budwood else []),
        "## What it is",
        table(("", ""), totals(report)),
        "## What was measured",
        measured(report, needs_budwood),
        *(
            part
            for section in report.get("training", [])
            for part in ("## Training", table(("", ""), training(section)))
        ),
        "## How it was made",
        table(("", ""), circumstances(report)),
        "Matrix by matrix: `report.md`; for programs: `report.json`; to make the folder again: "
        "`budwood prune SOURCE TARGET --recipe recipe.json`; as one page with pictures: `budwood report THIS_FOLDER`.",
        "## License",
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


def measured(report: Report, needs_budwood: bool) -> str:
    """What is known of quality and speed, and plainly what is not."""
    errors = [block["relative_error"] for block in report["blocks"] if block["relative_error"] is not None]
    counted = humanize.share(report["totals"]["bytes"] / report["totals"]["bytes_dense"], 1)
    error = humanize.span(errors) if errors else "not measured"
    how = (
        " Packed matrices are multiplied as they are stored by the native kernels of budwood; without these they are "
        "unpacked at each product, which saves memory and no time."
        if needs_budwood
        else ""
    )
    rounded = rounding(report)
    return "\n".join(
        [
            f"- Output error of a block, relative: {error}.",
            *([f"- Rounding error of a matrix: {humanize.span(rounded)}."] if rounded else []),
            f"- Bytes, counted: {counted} of the dense model.",
            f"- Perplexity: {LATER['## Evaluation']}",
            f"- Speed: {LATER[SPEED]}{how}",
        ]
    )


SPEED = "## Speed"
LATER = {  # what a new card says of a section that a later verb adds
    SPEED: "not measured when this card was written; `budwood bench` measures it.",
    "## Evaluation": "not measured when this card was written; `budwood evaluate` measures it.",
}


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
    if rows:
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
    """The model card with its speed section added or replaced."""
    return with_section(card, SPEED, render_speed(speed))


def with_section(card: str, heading: str, content: str) -> str:
    """The model card with a section added at its end, or replaced where it stands."""
    if heading in LATER:
        name = heading.removeprefix("## ")
        card = card.replace(LATER[heading], f"see [{name}](#{name.lower()}).", 1)
    before, found, after = card.partition(f"\n{heading}\n")
    rest = after[after.index("\n## ") :] if found and "\n## " in after else ""
    return f"{before.rstrip()}\n\n{heading}\n\n{content}\n{rest}"
