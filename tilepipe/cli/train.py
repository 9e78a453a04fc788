"""``tilepipe train``: make weights from annotated images."""

from __future__ import annotations

import json
import time
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilepipe.cli import options
from tilepipe.cli.steps import NowAndThen, duration, tell_machine
from tilepipe.errors import SpecError, argument

if TYPE_CHECKING:
    from tilepipe.train.events import Event, TrainResult

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


SECTIONS = {
    "Images": "job images labels out target mpp val val-labels val-share exclude kinds",
    "Network": "model classes class-names base option",
    "Training": "steps epochs minutes batch output-px loss optimizer lr schedule ema clip "
    "no-augment seed",
    "How it runs": "device precision store resume overwrite",
}


@click.command("train", cls=options.Sectioned, sections=SECTIONS)
@click.option("--job", type=FILE, help="Settings as TOML; options win over it.")
@click.option("--images", type=FOLDER, help="Folder of TIFF, PNG or OME-Zarr images.")
@click.option("--labels", type=FOLDER, help="Folder of their labels, of the same names.")
@click.option("-o", "--out", type=FILE, help="Weights to write (.safetensors).")
@click.option("--model", help="Architecture (default unet), see `tilepipe models`.")
@click.option(
    "--target",
    type=click.Choice(["classes", "foreground", "foreground+border"]),
    help="What labels are: class ids (default), or cells of which to learn inside (and border).",
)
@click.option("--classes", type=click.IntRange(1, 255), help="Classes; 1 is a sigmoid network.")
@click.option("--class-names", help="Names, background first: background,nucleus,...")
@click.option("--base", type=click.IntRange(1, 1024), help="Channels of the first level.")
@click.option("--option", "net_options", multiple=True, metavar="KEY=VALUE", help="Of the network.")
@click.option("--mpp", type=float, help="µm per px of the images, kept with the weights.")
@click.option("--val", type=FOLDER, help="Folder of validation images; else a seeded split.")
@click.option("--val-labels", type=FOLDER, help="Folder of their labels.")
@click.option("--val-share", type=float, help="Share held back for validation (default 0.1).")
@click.option("--exclude", type=FILE, help="Names, one a line, not to be used at all.")
@click.option("--kinds", type=FILE, help="CSV id,kind: metrics and splits per kind.")
@click.option("--steps", type=click.IntRange(1), help="Stop after so many steps.")
@click.option("--epochs", type=float, help="Stop after so many passes over the images.")
@click.option("--minutes", type=float, help="Stop after so many minutes.")
@click.option("--batch", type=click.IntRange(1), help="Samples per step (default 4).")
@click.option(
    "--output-px", type=click.IntRange(1), help="Side of what a sample teaches, px (default 256)."
)
@click.option(
    "--loss",
    help="ce, weighted-ce (default), bce, dice, focal, ms-ssim, iou, hybrid; sums: a+b, where "
    "weighted-ce weighs all.",
)
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), help="Default adamw.")
@click.option("--lr", type=float, help="Peak learning rate (default 0.002; sgd 0.01).")
@click.option(
    "--schedule",
    type=click.Choice(["one-cycle", "cosine", "constant"]),
    help="Of the learning rate (default one-cycle).",
)
@click.option("--ema", type=float, help="Decay of the averaged weights (default 0.998); 0: none.")
@click.option("--clip", type=float, help="Largest gradient norm (default 1).")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="Of the forward and backward pass (default auto).",
)
@click.option("--device", help="auto (default), cpu, cuda, cuda:1.")
@click.option(
    "--store",
    type=click.Choice(["fp32", "fp16"]),
    help="Numbers in the weights file (default fp32).",
)
@click.option("--seed", type=click.IntRange(0), help="Of weights, samples and split (default 0).")
@click.option("--no-augment", is_flag=True, help="Learn from images as they are.")
@click.option("--resume", is_flag=True, help="Go on where a killed training was.")
@click.option("--overwrite", is_flag=True, help="Train anew in the place of what lies there.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(as_json: bool, quiet: bool, resume: bool, overwrite: bool, **flags: Any) -> None:
    """Train a network on annotated images and write the best weights by validation.

    Beside the weights: a CSV log and a PNG curve.

    \b
    tilepipe train --images img --labels lab --target foreground --minutes 30 -o w.safetensors
    """  # noqa: D301
    from tilepipe.train.loop import train
    from tilepipe.train.spec import TrainSpec

    if resume and overwrite:
        raise click.UsageError("--resume goes on and --overwrite begins anew: give one of them")
    given = _given(flags)
    job = given.pop("job", None)
    try:
        spec = TrainSpec.from_toml(job, **given) if job else TrainSpec.checked(given)
    except SpecError as error:
        if job is None and not {"images", "labels", "out"} <= set(given):
            raise click.UsageError("--images, --labels and -o are needed, or --job") from error
        raise
    if as_json or quiet:
        hear = (lambda _: None) if quiet else _Lines(as_json=True).show
        result = train(spec, resume=resume, overwrite=overwrite, on_event=hear)
        if as_json:
            click.echo(json.dumps(result.to_json()))
        return
    with _Display() as display:
        result = train(spec, resume=resume, overwrite=overwrite, on_event=display.show)
    _summary(result, spec.model)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Options that stand on the command line, as settings."""
    given = {key: value for key, value in flags.items() if value is not None}
    if names := given.pop("class_names", None):
        given["class_names"] = tuple(name.strip() for name in names.split(","))
    pairs = given.pop("net_options")
    if pairs:
        given["options"] = options.key_values(pairs)
    if given.pop("no_augment"):
        from tilepipe.train.augment import NO_AUGMENT

        given["augment"] = NO_AUGMENT
    return given


class _Lines:
    """Where a training stands, in a line every few seconds on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._clock = NowAndThen()
        self._metric: float | None = None
        self._first: tuple[float, float] | None = None
        """When the first step was done, and how far the budget was used up then."""

    def show(self, event: Event) -> None:
        """Hear one event."""
        from tilepipe.train.events import Stepped, Validated

        if isinstance(event, Validated):
            self._metric = event.metric if isfinite(event.metric) else None
        if not isinstance(event, Stepped):
            return
        now_s = time.monotonic()
        if self._first is None:
            self._first = now_s, event.progress
        began_s, before = self._first
        gone = event.progress - before
        left_s = (now_s - began_s) / gone * (1 - event.progress) if gone > 0 else None
        if not self._clock.is_time():
            return
        if self._as_json:
            tell_machine(
                step=event.step, progress=event.progress, left_s=left_s,
                loss=event.loss if isfinite(event.loss) else None, metric=self._metric,
                samples_per_s=event.samples_per_s,
            )  # fmt: skip
        else:
            metric = "" if self._metric is None else f"metric {self._metric:.4f}, "
            click.echo(
                f"step {event.step}, {event.progress:.0%}: loss {event.loss:.4f}, {metric}"
                f"{event.samples_per_s:.1f} samples/s, {duration(left_s)} left",
                err=True,
            )


class _Display:
    """Live progress: loss, metric, samples/s."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(markup=False)  # kinds are anyone's words
        self.progress = Progress(
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=1.0)
        self.metric = ""
        self.lines = _Lines(as_json=False)

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        from tilepipe.train.events import Started, Stepped

        if not self.console.is_terminal:
            self.lines.show(event)
        if isinstance(event, Stepped):
            text = (
                f"step {event.step}  loss {event.loss:.4f}  {self.metric}"
                f"{event.samples_per_s:.1f} samples/s"
            )
            self.progress.update(self.task, completed=event.progress, description=text)
        elif isinstance(event, Started):
            resumed = f", from step {event.resumed_step}" if event.resumed_step else ""
            self.console.print(
                f"{event.training} images to learn from, {event.validation} to choose by; "
                f"{event.parameters} parameters; {event.device}, {event.precision}{resumed}"
            )
        elif event.scores:  # else there are no images to choose by
            self.metric = f"metric {event.metric:.4f}  "
            kinds = "; ".join(
                f"{score.kind or 'all'}: Dice {score.dice:.4f}"
                + ("" if score.f1 is None else f", F1 {score.f1:.4f}")
                for score in event.scores
            )
            kept = " (kept)" if event.best else ""
            self.console.print(f"step {event.step}: metric {event.metric:.4f}{kept}  {kinds}")


def _summary(result: TrainResult, model: str) -> None:
    metric = f", metric {result.metric:.4f}" if result.scores else ""
    click.echo(
        f"{result.weights}: step {result.best_step} of {result.steps}{metric}, "
        f"{result.elapsed_s:.0f} s\n"
        f"next: tilepipe run SLIDE --model {model} --weights {argument(result.weights)}"
    )
