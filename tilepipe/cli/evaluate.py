"""``tilepipe evaluate``: compare a mask with the truth."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tilepipe.cli import options
from tilepipe.cli.masks import check_masks

if TYPE_CHECKING:
    from tilepipe.train.evaluate import Evaluation

KINDS = click.Choice(["auto", "classes", "instances"])


@click.command("evaluate")
@click.argument("predicted", metavar="PRED")
@click.argument("truth", metavar="TRUTH")
@click.option("--label", help="Label of PRED, if it is a store with several.")
@click.option("--truth-label", help="Label of TRUTH, if it is a store with several.")
@click.option(
    "--pred-kind", type=KINDS, default="auto", help="Ids of PRED; auto: wider than 8 bit = cells."
)
@click.option("--truth-kind", type=KINDS, default="auto", help="Ids of TRUTH.")
@click.option("--border", type=click.IntRange(1, 255), help="Class of PRED that separates cells.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(as_json: bool, quiet: bool, **settings: Any) -> None:
    """Compare PRED with TRUTH: stores or label images of one size, read by pieces.

    Per class Dice, IoU, precision and recall; pixel error; foreground-restricted Rand error and
    warping error (ISBI 2012); F1 and AP of cells at IoU 0.5 to 0.95.
    """
    from tilepipe.cli.steps import progress
    from tilepipe.train.evaluate import evaluate, open_labels

    predicted = open_labels(settings["predicted"], name=settings["label"])
    truth = open_labels(settings["truth"], name=settings["truth_label"])
    for one in (predicted, truth):
        if one.stored is not None:
            check_masks(one.stored[0], [one.stored[1]], image=False, quiet=quiet)
    with progress(settings["predicted"], quiet=quiet, as_json=as_json) as tell:
        result = evaluate(
            predicted,
            truth,
            predicted_kind=settings["pred_kind"],
            truth_kind=settings["truth_kind"],
            border=settings["border"],
            tell=tell,
        )
    for note in () if quiet else result.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    elif not quiet:
        _show(result)


def _show(result: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # the names of classes are anyone's words
    table = Table("class", "Dice", "IoU", "precision", "recall", "px true", "px found")
    rows = dict(result.classes)
    if result.compared == "classes":
        rows["(all but the first)"] = result.foreground
    for name, score in rows.items():
        table.add_row(
            name,
            *(f"{v:.4f}" for v in (score.dice, score.iou, score.precision, score.recall)),
            str(score.truth_px),
            str(score.predicted_px),
        )
    console.print(table)
    console.print(f"pixel error     {result.pixel_error:.4f}")
    console.print(f"Rand error      {result.rand_error:.4f}  (inside true objects, 1 - F)")
    if result.warping_error is not None:
        console.print(f"warping error   {result.warping_error:.6f}")
    console.print(
        f"objects         {result.objects_predicted} found, {result.objects_truth} true; "
        f"F1 {result.f1['0.50']:.4f} at IoU 0.50, {result.f1['0.75']:.4f} at 0.75; "
        f"mean AP {result.mean_ap:.4f}"
    )
