"""A pruned folder in another form: dense, in another format, or with rounded values; without calibration text."""

from pathlib import Path

from budwood.checkpoints.source import open_source
from budwood.errors import UsageError
from budwood.formats import known_layout, rounds, values_of
from budwood.progress import Progress
from budwood.reports.record import Report
from budwood.runs.origin import recipe_of, recovered
from budwood.runs.recipe import Recipe
from budwood.runs.run import Run
from budwood.stream.arithmetic import name_of
from budwood.stream.model import Model


def repack(
    folder: str | Path,
    target: str | Path,
    format: str = "auto",
    values: str | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Writes the pruned model of `folder` into `target` in another layout; returns the report that is also written.

    The same call continues where an earlier one was interrupted. format="dense" gives a folder that loads anywhere,
    with zeros in place. With values="int8" or "int4" every matrix is rounded as it is; in `prune` later blocks see
    the rounding of earlier ones.
    Raises UsageError where `folder` was not pruned by budwood or is rounded already, or where `target` is taken;
    RunError where a shard is damaged.
    """
    layout = known_layout(format, values)
    opened = open_source(folder, trust_remote_code)
    if Path(target).expanduser().resolve() == opened.folder.resolve():
        raise UsageError(f"{target} is the folder to export itself; give another folder")
    made = recipe_of(opened)
    if layout == "dense" and not opened.packed and not hasattr(opened.config, "quantization_config"):
        raise UsageError(f"{folder} is stored dense already, so there is nothing to unpack; give a packed folder")
    kinds = {kind for entry in opened.packed.values() if (kind := values_of(entry["format"])) is not None}
    if rounds(layout) and kinds:
        kind = " and ".join(sorted(kinds))
        raise UsageError(f"the values of {folder} are {kind} already; export the folder that they were rounded from")
    opened.check()
    model = Model(opened, skip=made.skip)
    recipe = Recipe(
        verb="export",
        method=made.method,
        source={"name": str(folder), "sha256": opened.fingerprint},
        data=made.data,
        dtype=name_of(model.storage),
        format=layout,
        skip=made.skip,
        made_from=made.to_json(),
    )
    with Run.open(target, recipe, opened, overwrite=overwrite, progress=progress) as run:
        if run.report is not None:
            return run.report
        run.start(model, {})
        run.note(f"exported from {folder}, whose report has the output errors of the blocks")
        for block in run.blocks(None, f"storing as {layout}"):
            for linear in block.linears.values():
                linear.recovered = recovered(linear)
        return run.finish(None, opened.license)
