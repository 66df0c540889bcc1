"""Recipes of comparisons, the records of their runs, results and reports as `report` shows them."""

import json
from pathlib import Path
from random import Random

from fuzz_folders import Unsound, copied, rewrite
from fuzz_mutate import bytes_mutated, json_bytes, mutated, text_mutated
from fuzz_seeds import RECIPE, Seeds

from budwood.comparison.compare import Comparison
from budwood.comparison.recipe import read_recipe_file
from budwood.comparison.runs import runs_of
from budwood.pages.gather import gather
from budwood.pages.page import render
from budwood.pages.page import report as write_page
from budwood.reports.comparison import FILE, MOST_RUNS

GRIDS = (
    "{0.1,0.2}",
    "{}",
    "{1}",
    "{" + ",".join(map(str, range(1500))) + "}",
    "{a:1}",
    "{{1}}",
    "}",
    "${x}",
    "${here}",
)


def recipe_bytes(chance: Random) -> bytes:
    """A recipe with other values, or other characters."""
    import yaml

    text = RECIPE
    if chance.random() < 0.6:
        text = yaml.safe_dump(mutated(chance, yaml.safe_load(RECIPE)), sort_keys=False, allow_unicode=True)
    if chance.random() < 0.3:
        place = chance.randint(0, len(text))
        text = text[:place] + chance.choice(GRIDS) + text[place:]
    if chance.random() < 0.4:
        text = text_mutated(chance, text)
    data = text.encode(errors="surrogatepass")
    return data if chance.random() < 0.8 else bytes_mutated(chance, data)


def recipe_file(chance: Random, seeds: Seeds, folder: Path) -> None:
    """What is accepted stands for runs with names of their own, not too many."""
    file = folder / "recipe.yaml"
    file.write_bytes(recipe_bytes(chance))
    given = (
        {"share": chance.choice(("0.5", "9" * 5000, "[" * 50, "2001-99-99", "{1,2}"))} if chance.random() < 0.3 else {}
    )
    runs = runs_of(read_recipe_file(file, given))
    if len({run.name for run in runs}) < len(runs) or len(runs) > MOST_RUNS:
        raise Unsound(f"it stands for {len(runs)} runs, of which some have the same name")


def records(chance: Random, seeds: Seeds, folder: Path) -> None:
    """A finished comparison in which one file of a run is mutated: read again, or refused."""
    inner = copied(seeds.compared, folder / "out")
    files = sorted(file for file in inner.glob("runs/**/*.json"))
    file = chance.choice(files)
    rewrite(file, json_bytes(chance, json.loads(file.read_bytes()), 2))
    comparison = Comparison.read(seeds.recipe, inner, jobs=0)
    comparison.find_tasks()
    comparison.write()


def shown(chance: Random, seeds: Seeds, folder: Path) -> None:
    """The page of a folder or of a comparison, without pictures."""
    origin = seeds.compared if chance.random() < 0.6 else seeds.measured
    name = FILE if origin == seeds.compared else "report.json"
    (folder / name).write_bytes(json_bytes(chance, json.loads((origin / name).read_bytes())))
    page = render(gather([folder]), [])
    if "<script>alert" in page:
        raise Unsound("markup of the results is markup of the page")


def drawn(chance: Random, seeds: Seeds, folder: Path) -> None:
    """The page with its pictures: numbers of any size."""
    origin = seeds.compared if chance.random() < 0.5 else seeds.measured
    name = FILE if origin == seeds.compared else "report.json"
    (folder / name).write_bytes(json.dumps(mutated(chance, json.loads((origin / name).read_bytes()), 6)).encode())
    write_page([folder])


COMPARE_TARGETS = (
    ("compare recipe", 60, recipe_file),
    ("compare records", 10, records),
    ("page", 10, shown),
    ("page, drawn", 1, drawn),
)
