"""The training curve: loss and validation metric over steps, as a PNG beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tilepipe.models.checkpoint import taking_the_name_of
from tilepipe.train.log import Row


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of a log; loss on the left axis, metric on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    losses = figure.add_subplot()
    metrics = losses.twinx()
    steps = [row.step for row in rows]
    losses.plot(steps, [row.loss for row in rows], color="tab:blue", marker=".")
    metrics.plot(steps, [row.metric for row in rows], color="tab:orange", marker=".")
    losses.set_xlabel("step")
    losses.set_ylabel("training loss", color="tab:blue")
    metrics.set_ylabel("validation metric", color="tab:orange")
    with taking_the_name_of(path) as partial:
        canvas.print_png(str(partial))
