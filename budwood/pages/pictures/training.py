"""Loss curves of retraining: of the training windows, and of those held out."""

from collections.abc import Iterator, Sequence

from budwood.pages import conditions
from budwood.pages.pictures.drawing import Picture, figure, legend, picture, series
from budwood.pages.pictures.errors import omitted
from budwood.pages.shown import Shown
from budwood.pages.text import number, short

MOST = 4


def training(models: Sequence[Shown]) -> Iterator[Picture]:
    found = [
        (model, section)
        for model in models
        for section in model.training
        if section.get("loss") or section.get("held_out")
    ]
    if not found:
        return
    shown = found[:MOST]
    made, axes = figure(3.2 + 0.16 * len(shown))
    said = []
    for index, (model, section) in enumerate(shown):
        style = series(index)
        every = number(section.get("steps_per_loss")) or 1
        losses = [number(loss) for loss in section.get("loss") or []]
        name = short(model.label, 26)
        if any(loss is not None for loss in losses):
            axes.plot(
                [every * (step + 0.5) for step in range(len(losses))],
                [float("nan") if loss is None else loss for loss in losses],
                color=style["color"],
                linewidth=0.9,
                linestyle="-",
                label=f"{name}, training",
            )
        held = [(number(step), number(loss)) for step, loss in section.get("held_out") or []]
        known = [(step, loss) for step, loss in held if step is not None and loss is not None]
        if known:
            axes.plot([x for x, _ in known], [y for _, y in known], label=f"{name}, held out", **style)
            best = min(known, key=lambda pair: pair[1])
            said.append(f"{name}: held-out loss {known[0][1]:.4g} before, {best[1]:.4g} after step {best[0]:.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    legend(made, axes, 1 if len(shown) == 1 else 2)
    yield picture(
        made,
        "training",
        "Loss while retraining",
        "Thin: means of the training windows. With marks: windows held out; the state with the lowest is kept."
        + omitted(len(found), len(shown)),
        f"Line chart of the loss by step. {'; '.join(said) or 'No windows were held out'}.",
        conditions=[conditions.pruning(model) for model, _ in shown],
    )
