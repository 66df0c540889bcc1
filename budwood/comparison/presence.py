"""Whether what a recipe names is there: sources, texts, packages. Nothing is opened but the first bytes of texts."""

from collections.abc import Iterator
from pathlib import Path

from budwood.checkpoints.locate import local_folder
from budwood.comparison.document import Document, Place, yaml_package
from budwood.comparison.fields import at
from budwood.comparison.recipe import Recipe, RecipeRow
from budwood.data.files import TEXT_READERS, Reading, suffix_of
from budwood.data.mix import mix_of
from budwood.data.sources import ID_SUFFIXES, read_path
from budwood.data.speeches import speeches
from budwood.data.texts import Purpose
from budwood.demo_assets import SMALL_MODEL
from budwood.errors import UsageError
from budwood.evaluation.task_rows import require_harness, rows_of

SMOLLM2 = "smollm2"  # the source that is converted from its package
HUB_DATA = ("wikitext2", "c4")


def check_files(recipe: Recipe) -> None:
    """Raises UsageError, with the line, where a source or a text of the recipe is not there."""
    document = recipe.document
    for name, source in recipe.fields.sources.items():
        with at(document, ("sources", name)):
            if is_packaged(source.model):
                SMALL_MODEL.locate()
            else:
                local_folder(source.model)
    for name, text in recipe.fields.evaluate.texts.items():
        check_data(text.data, "evaluation", ("evaluate", "texts", name, "data"), document)
    tasks = recipe.fields.evaluate.tasks
    if tasks is not None:
        with at(document, ("evaluate", "tasks")):
            rows_of(tasks.names, None if tasks.data is None else Path(tasks.data))
    for row in calibrated(recipe):
        own = (*row.place[:2], "calibration", "data")
        place = own if own in document.lines else ("calibration", "data")
        check_data(str(row.calibration.data), "calibration", place, document)


def calibrated(recipe: Recipe) -> Iterator[RecipeRow]:
    """The rows that need text."""
    return (row for row in recipe.rows if any(method and method.calibrated for method in row.methods))


def is_packaged(model: str) -> bool:
    """Whether a source is the model of a package, and not a folder of that name."""
    return model == SMOLLM2 and not Path(SMOLLM2).is_dir()


def check_data(data: str, purpose: Purpose, place: Place, document: Document) -> None:
    """Raises UsageError, with the line, where a text is neither a name that is known nor a file that is there."""
    with at(document, place):
        if purpose == "calibration" and (mix := mix_of(data)):
            for part, _ in mix.parts:
                check_data(part, purpose, place, document)
            return
        if data == "sotu" or data.startswith("sotu:"):
            speeches(data, purpose)
        elif data not in HUB_DATA and not data.startswith("hf:"):
            path = Path(data)
            known = path.is_file() and suffix_of(path) in (*TEXT_READERS, *ID_SUFFIXES)
            if not known:
                read_path(path, data, Reading())


def check_packages(recipe: Recipe) -> None:
    """Raises UsageError where a package that the recipe needs is missing, before anything runs."""
    from importlib.util import find_spec

    yaml_package()
    if find_spec("pyarrow") is None:
        raise UsageError("results.parquet needs the package pyarrow; run: pip install 'budwood[compare]'")
    if recipe.fields.evaluate.tasks is not None:
        require_harness()
