"""The account as a picture: one stacked bar per run, and the speeds beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tilepipe.errors import ExportError

COLORS = {
    "read": "#4dbbd5",
    "decode": "#91d1c2",
    "ingest-write": "#00a087",
    "host-to-device": "#f39b7f",
    "compute": "#e64b35",
    "device-to-host": "#dc0000",
    "encode": "#b09c85",
    "write": "#3c5488",
    "reduce": "#8491b4",
    "idle": "#dddddd",
}


FORMATS = (".pdf", ".png", ".svg")


def check_plot(path: Path) -> None:
    """Find out before minutes of measuring, not after them, that there is no place for the plot.

    Raises ExportError.
    """
    if path.suffix.lower() not in FORMATS:
        raise ExportError(f"{path}: a plot is called {', '.join(FORMATS)}; name another --plot")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ExportError(
            f"{path}: the plot could not be written, {path.parent} is no folder that can be "
            "written to; make it first, or name another --plot"
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a result of ``bench`` as PNG, SVG or PDF; ExportError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained"
    )
    names = [f"{run['gpus'] or result['machine']['device']}" for run in result["runs"]]
    start = [0.0] * len(names)
    steps = dict.fromkeys(step for run in result["runs"] for step in run["account"]["shares"])
    for step in steps:
        shares = [run["account"]["shares"].get(step, 0.0) for run in result["runs"]]
        left.barh(names, shares, left=start, label=step, color=COLORS.get(step, "#7e6148"))
        start = [before + share for before, share in zip(start, shares, strict=True)]
    left.set_xlabel("% of the lanes' time")
    left.legend(ncols=5, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    left.set_title(f"{result['model']['name']}, {result['extent'][1]} x {result['extent'][0]} px")
    speeds = {
        "bare network": result["bare_mpix_per_s"],
        "engine, from memory": result["engine_mpix_per_s"],
        "pipeline": result["pipeline_mpix_per_s"],
        "pipeline with start": result["cold_mpix_per_s"],
    }
    bars = right.barh(list(speeds)[::-1], list(speeds.values())[::-1], color="#3c5488")
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.margins(x=0.15)
    right.set_xlabel("MPix/s of output")
    right.set_title(f"{result['pipeline_share']:.0%} of the bare network's best")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: the plot cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
