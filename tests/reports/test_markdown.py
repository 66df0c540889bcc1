"""The report and the card show what was measured, and no name or note becomes markup."""

import contextlib
import html
import re

import malformed
import pytest
from huggingface_hub import ModelCard

from budwood.errors import RunError
from budwood.reports.card import render_card
from budwood.reports.markdown import code, escape, render_report
from budwood.reports.record import FILE, read_report

HOSTILE = "<img src=x onerror=1> | [a](javascript:b) `c` **d** ![e](f) $g$\n# h"


def report(**changes):
    made = {
        "budwood": "0.1.0",
        "source": "base",
        "method": "wrp(alpha=0.25)",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": {"processor": "a processor", "threads": 2, "accelerator": None},
        "data": {"name": "sotu", "sha256": "abc", "seed": 0},
        "dtype": "bfloat16",
        "compute_dtype": "float32",
        "format": "auto",
        "totals": {
            "parameters": 134_515_008,
            "in_scope": 106_168_320,
            "coverage": 0.7893,
            "density": 0.5145,
            "recovered": 0.0145,
            "recovered_unweighted": 0.0144,
            "bytes": 181_000_000,
            "bytes_dense": 269_030_016,
            "bits_per_weight": 9.379,
        },
        "blocks": [{"name": "model.layers.0", "seconds": None, "relative_error": 0.125}],
        "linears": {
            "model.layers.0.mlp.up_proj": {
                "shape": [1536, 576],
                "format": "two_four_compact",
                "nonzeros": 455_000,
                "density": 0.5143,
                "recovered": 0.0143,
                "bytes": 1_037_000,
            }
        },
        "seconds": {"blocks": 20.0, "total": 21.5},
        "peak_memory": 1_450_000_000,
        "notes": [],
    }
    return made | changes


def outside_code(page: str) -> str:
    return re.sub(r"(`+).*?\1", "", page)


def test_the_figures_are_in_the_report():
    page = render_report(report())
    for figure in (
        "134,515,008",
        "78.9 %",
        "51.45 %",
        "1.450 %",
        "9.379",
        "181,000,000",
        "67.3 %",
        "12.50 %",
        "1536 x 576",
    ):
        assert figure in page


def test_rows_of_a_table_have_as_many_cells_as_its_head():
    for block in re.findall(r"(?:^\|.*\|\n)+", render_report(report(source=HOSTILE, notes=[HOSTILE])), re.MULTILINE):
        counts = {len(re.split(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(counts) == 1


@pytest.mark.parametrize("render", [render_report, lambda made: render_card(made, None, HOSTILE, HOSTILE)])
def test_foreign_text_is_never_markup(render):
    made = report(
        source=HOSTILE,
        method=HOSTILE,
        notes=[HOSTILE],
        data={"name": HOSTILE},
        machine={"processor": HOSTILE},
    )
    made["linears"] = {HOSTILE: report()["linears"]["model.layers.0.mlp.up_proj"]}
    page = render(made)
    body = page.split("\n---\n", 1)[1] if page.startswith("---\n") else page
    plain = outside_code(body)
    assert "<" not in plain
    assert not re.search(r"(?<!\\)\[a", plain)
    assert "\n# h" not in body


@pytest.mark.parametrize("text", ["a", "`", "a`b``c", "``", "wrp(alpha=0.25)"])
def test_a_code_span_is_closed_by_its_own_fence_only(text):
    span = code(text)
    fence = re.match(r"`+", span)[0] if not span.startswith("` ") else "`"
    assert text in span
    assert fence not in re.findall(r"`+", text)


def test_escaping_is_undone_by_reading():
    assert html.unescape(re.sub(r"\\(.)", r"\1", escape(HOSTILE))) == " ".join(HOSTILE.split())


def test_the_hub_reads_the_card():
    card = ModelCard(
        render_card(report(), "owner/base", "apache-2.0", "LlamaForCausalLM"), ignore_metadata_errors=False
    )
    assert card.data.base_model == "owner/base"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert {"budwood", "pruned"} <= set(card.data.tags)
    assert "wrp(alpha=0.25)" in card.text


def test_the_card_says_what_was_not_measured():
    card = render_card(report(blocks=[]), None, None, None)
    assert "Speed: not measured" in card
    assert "Perplexity: not measured" in card
    assert "Output error of a block, relative: not measured" in card
    assert "base_model" not in card


def test_a_local_path_is_no_base_model_and_stays_private():
    card = render_card(report(source="/home/someone/base"), "/home/someone/base", None, None)
    assert "base_model" not in card
    assert "someone" not in card


def test_only_packed_folders_need_budwood_to_load():
    packed, dense = (render_card(report(format=layout), None, None, None) for layout in ("auto", "dense"))
    assert 'pip install "budwood>=0.1.0" transformers torch' in packed
    assert "budwood export THIS_FOLDER" in packed
    assert "pip install transformers torch" in dense
    assert "budwood export" not in dense
    assert "import budwood" not in packed + dense


def test_a_pattern_without_recovery_does_not_mention_it():
    made = report()
    made["totals"] = made["totals"] | {"recovered": None}
    assert "recovered beyond" not in render_report(made)


def test_rounding_is_shown_where_values_are_rounded():
    made = report()
    assert "ounding error" not in render_report(made) + render_card(made, None, None, None)
    name, matrix = next(iter(made["linears"].items()))
    made["linears"] = {name: matrix | {"rounding_error": 0.00567}, "b": matrix | {"rounding_error": None}}
    page = render_report(made)
    assert "| density | recovered | rounding error | bytes |" in page
    assert "| 1.43 % | 0.57 % | 1,037,000 |" in page
    assert "| 1.43 % | - | 1,037,000 |" in page
    assert "Rounding error of a matrix: 0.57 % to 0.57 %" in render_card(made, None, None, None)


def test_any_report_that_is_read_is_rendered(tmp_path):
    """With any value missing or of another type, it is refused when it is read, or shown."""
    shown, section = (
        0,
        {"trained": 8, "trained_share": 0.1, "steps": 9, "best_step": 4, "held_out": [[0, 3.5], [4, 3.0]]},
    )
    section |= {"loss": [3.5, 3.0], "steps_per_loss": 1, "seconds": 2.0, "state_bytes": 64, "move": "norms"}
    blocks = {**section, "blocks": [{"error_before": 0.5, "error_after": 0.25}]}
    whole = report(training=[section, blocks])
    found = malformed.mutations(whole)
    for place, value in found:
        malformed.write(tmp_path / FILE, malformed.changed(whole, place, value))
        with contextlib.suppress(RunError):
            read = read_report(tmp_path)
            render_report(read), render_card(read, "base", None, "LlamaForCausalLM")
            shown += 1
    assert 50 < shown < len(found) / 2
