"""The page shows what the folders hold, escapes every text, replaces only its own file, and reads well in a browser."""

import html
import json
import re
from html.parser import HTMLParser

import browser
import pytest
import sample

from budwood.errors import RunError, UsageError
from budwood.pages.gather import gather
from budwood.pages.page import MARK, report

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\u202egnp.exe\x1b[31m\x07$x_1$ {{ 7 * 7 }}"
ALL = {"front", "alpha", "error-by-block", "error-by-kind", "units", "groups", "speed", "products", "density"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A comparison and a single folder: the files and the results of `report`."""
    root = tmp_path_factory.mktemp("pages")
    folders = {"compared": sample.comparison_folder(root / "c"), "single": sample.pruned_folder(root / "one")}
    return {name: report([folder], root / f"{name}.html") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The text of a page of which every name is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    made = sample.report(
        f"wrp({HOSTILE})", name=HOSTILE, results=sample.results(), speed=sample.speed(), training=sample.TRAINING
    )
    made |= {"notes": [HOSTILE], "dtype": HOSTILE, "machine": {"processor": HOSTILE}, "data": {"data": HOSTILE}}
    made["linears"] = {f"model.layers.0.{HOSTILE}": next(iter(made["linears"].values()))}
    made["results"][0]["text"] = {**sample.TEXT, "name": HOSTILE}
    (root / "report.json").write_text(json.dumps(made))
    report([root], root / "out.html", title=HOSTILE)
    return root / "out.html"


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def text(pages, name):
    with open(pages[name]["file"], encoding="utf-8") as file:
        return file.read()


def test_every_picture_appears_when_its_data_is_there(pages):
    assert set(pages["compared"]["pictures"]) == ALL
    assert set(pages["single"]["pictures"]) == ALL - {"front", "alpha"} | {"training"}
    assert text(pages, "compared").count("<svg") == len(pages["compared"]["pictures"])


def test_figures_have_their_conditions(pages):
    page = text(pages, "single")
    assert "30.5" in page
    assert "179.1 MB" in page
    notes = re.findall(r'<li id="c(\d+)">(.*?)</li>', page)
    measured = next(line for _, line in notes if "wiki.test.raw" in line)
    for part in ("plain", "4 windows of 2,048 tokens", "float32", "AMD EPYC", "2 threads", "torch 2.13.0"):
        assert part in measured
    referred = set(re.findall(r'href="#c(\d+)"', page))
    assert referred <= {number for number, _ in notes}
    perplexity = re.search(r"<bdi>30.5</bdi><sup><a href=\"#c(\d+)\"", page)
    assert dict(notes)[perplexity[1]] == measured


def test_a_page_needs_nothing_else(pages):
    for name in pages:
        attributes = Elements(text(pages, name)).attributes
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith(("#", "data:")), (key, value)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", text(pages, name))


def test_ids_are_unique_and_references_lead_somewhere(pages):
    for name in pages:
        attributes = Elements(text(pages, name)).attributes
        ids = [value for key, value in attributes if key == "id"]
        assert len(ids) == len(set(ids))
        referred = {value[1:] for key, value in attributes if key in ("href", "xlink:href") and value[:1] == "#"}
        referred |= set(re.findall(r"url\(#([^)]*)\)", text(pages, name)))
        assert referred <= set(ids)


def test_no_foreign_text_becomes_markup(hostile):
    page = hostile.read_text("utf-8")
    found = Elements(page)
    assert found.tags.count("script") == 1
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "alert" not in "".join(found.scripts)
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "\\u202e" in page
    assert "{{ 7 * 7 }}" in html.unescape(page)
    assert "$x_1$" in page


def test_another_file_is_not_replaced(tmp_path):
    folder = sample.pruned_folder(tmp_path / "one")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="no report of budwood"):
        report([folder], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    for wrong in (tmp_path, tmp_path / "none" / "a.html"):
        with pytest.raises(UsageError):
            report([folder], wrong)


def test_what_cannot_be_shown_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        gather([tmp_path / "missing"])
    with pytest.raises(UsageError, match=r"neither report\.json nor results\.json"):
        gather([tmp_path])
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(RunError, match="damaged"):
        gather([tmp_path])


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
    made = sample.report(results=[{"kind": "perplexity", "perplexity": "many"}, 3, {"kind": "new"}])
    made["totals"]["bits_per_weight"] = float("nan")
    made["blocks"][0]["relative_error"] = None
    (tmp_path / "report.json").write_text(json.dumps(made))
    (model,) = gather([tmp_path]).models
    assert "bits per weight" not in model.figures
    assert not [key for key in model.figures if key.startswith("perplexity")]


CHECK = """JSON.stringify({
  width: document.documentElement.scrollWidth, inner: innerWidth,
  unnamed: [...document.querySelectorAll("svg, img")]
    .filter(e => !(e.getAttribute("aria-label") || e.getAttribute("alt"))).length,
  outside: [...document.querySelectorAll("main *")]
    .filter(e => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > innerWidth + 1).length,
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
})"""


@pytest.fixture(scope="module")
def chromium():
    if browser.found() is None:
        pytest.skip("Chromium is not installed")
    with browser.Browser() as driven:
        yield driven


def test_a_browser_shows_the_pages_at_desktop_and_phone_width(pages, hostile, chromium):
    for name in (pages["compared"]["file"], pages["single"]["file"], hostile):
        for width, dark in ((1280, False), (360, True)):
            chromium.open(hostile.__class__(name), width, dark=dark)
            seen = json.loads(chromium.value(CHECK))
            assert chromium.complaints() == []
            assert seen["width"] <= seen["inner"] == width
            assert seen["unnamed"] == 0
            assert seen["outside"] == 0
            assert brightness(seen["ink"]) > 150 if dark else brightness(seen["ink"]) < 100
            assert abs(brightness(seen["ink"]) - brightness(seen["paper"])) > 150


def test_a_click_on_a_head_sorts_and_nothing_is_missing(pages, chromium):
    path = sample.Path(pages["compared"]["file"])
    chromium.open(path, 1280)
    column = "[...document.querySelector('tbody').rows].map(row => row.cells[2].dataset.v ?? null)"
    before = chromium.value(column)
    chromium.value("document.querySelectorAll('thead button')[2].click()")
    rising = chromium.value(column)
    known = [float(value) for value in rising if value is not None]
    assert known == sorted(known)
    assert rising[-1] is None
    chromium.value("document.querySelectorAll('thead button')[2].click()")
    assert [float(value) for value in chromium.value(column) if value is not None] == sorted(known, reverse=True)
    assert sorted(map(str, before)) == sorted(map(str, rising))


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_a_page_of_budwood_is_replaced(tmp_path):
    small = sample.report(blocks=1) | {"linears": {}}
    (tmp_path / "report.json").write_text(json.dumps(small))
    for _ in range(2):
        report([tmp_path])
    assert MARK in (tmp_path / "report.html").read_text("utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]
