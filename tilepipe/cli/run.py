"""``tilepipe run``: slides to OME-Zarr mask pyramids."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilepipe.cli import options
from tilepipe.cli.requests import requests_of, status_name
from tilepipe.errors import TilepipeError
from tilepipe.spec import JobSpec

if TYPE_CHECKING:
    from tilepipe.pipeline.run import Request, RunResult


SECTIONS = {
    "Input and output": "output manifest name level mpp slide-mpp max-pixels on-damage in-place "
    "tissue instances probabilities ome-zarr overwrite",
    "Network": "model weights classes base option exact cgm",
    "How it runs": "device precision tolerance backend tune tile batch halo unit",
    "Where it runs": "workers gpus scheduler part retries",
    "Job": "job dry-run trace",
}


@click.command("run", cls=options.Sectioned, sections=SECTIONS)
@click.argument("slides", nargs=-1, metavar="SLIDE...")
@click.option("-o", "--output", help="The store; with several slides a folder, one store each.")
@click.option(
    "--manifest",
    type=click.Path(dir_okay=False),
    help="CSV with columns slide, output, mpp, label, instead of SLIDE... .",
)
@click.option(
    "--model", help="Network by name (default unet; see `tilepipe models`) or weights file."
)
@click.option("--weights", help="Safetensors file, or random:SEED; default the bundled weights.")
@click.option("--classes", type=int, help="Classes, for random weights.")
@click.option("--base", type=int, help="Channels of the first level, for random weights.")
@click.option(
    "--option",
    "option_pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="Further argument of the architecture, for random weights.",
)
@click.option("--name", help="Label name in the store; default the model's.")
@click.option("--level", type=int, help="Pyramid level to segment; 0 (default) is the finest.")
@click.option("--mpp", type=float, help="Segment the level of this µm/px (within 10 %).")
@options.slide_mpp_option
@click.option("--device", help="auto (default), cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="auto (default): bf16 or fp16 where it is faster and flips hardly a pixel of this slide.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "openvino"]),
    help="auto (default): the faster one.",
)
@click.option(
    "--tolerance",
    type=float,
    help="Share of pixels that reduced precision may flip (default 0.001).",
)
@click.option(
    "--tune/--no-tune",
    default=None,
    help="Measure the best tile on this device (default), or take one by formula.",
)
@click.option(
    "--tile", metavar="auto|PX", help="Input side of a tile, px; 572 is the U-Net paper's."
)
@click.option("--batch", metavar="auto|N", help="Tiles per forward.")
@click.option("--halo", type=int, help="Px read around a tile's core; never less than the context.")
@click.option(
    "--exact", is_flag=True, default=None, help="Full context where one exists, whatever it costs."
)
@click.option(
    "--cgm",
    type=click.Choice(["off", "tile", "slide"]),
    help="Classification gate of UNet 3+: off (default), per tile, or over the whole slide.",
)
@options.unit_option
@options.workers_option
@click.option("--gpus", metavar="all|0,1", help="One worker process per GPU.")
@options.scheduler_option
@click.option(
    "--part", metavar="I/N", help="Do share I of N alone; `tilepipe finish` does the rest."
)
@click.option("--retries", type=int, help="Times a failing unit is tried again (default 3).")
@options.ome_zarr_option
@options.on_damage_option
@options.max_pixels_option
@click.option(
    "--tissue",
    metavar="auto|off|MASK",
    help="Skip empty glass: where it is found, nowhere (default), or where an image is 0.",
)
@click.option(
    "--in-place",
    is_flag=True,
    default=None,
    help="Segment straight from the TIFF; the store then holds labels only.",
)
@click.option(
    "--instances",
    is_flag=True,
    default=None,
    help="Also write connected objects as an int32 label.",
)
@click.option(
    "--probabilities",
    is_flag=True,
    default=None,
    help="Also write the probability of each class, as bytes, beside the mask.",
)
@click.option(
    "--job",
    type=click.Path(dir_okay=False),
    help="TOML file with any of these but --output, --manifest and --trace; flags win.",
)
@click.option(
    "--overwrite", is_flag=True, default=None, help="Make the output anew; with --part, its share."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its bill; write nothing.")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a timeline for Perfetto.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    slides: tuple[str, ...],
    output: str | None,
    manifest: str | None,
    option_pairs: tuple[str, ...],
    job: str | None,
    dry_run: bool,
    trace: str | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Segment SLIDE... into OME-Zarr: the image, its pyramid, and a mask pyramid beside it.

    The mask is that of the whole image run at once, whatever the tile, batch or workers. A run
    that was stopped, however it was stopped, goes on when the same command is given again.
    SLIDE may be an OME-Zarr: its mask is then added to it and nothing is copied.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    for key in ("tile", "batch"):
        if given.get(key, "auto") != "auto":
            given[key] = _number(key, given[key])
    if option_pairs:
        given["options"] = options.key_values(option_pairs)
    spec = (
        JobSpec.from_toml(Path(job), **given)
        if job is not None
        else JobSpec.checked(given, source="run")
    )
    requests = requests_of(slides, output, manifest, spec)
    several = manifest is not None or len(requests) > 1
    if dry_run:
        _bill(requests, several=several, as_json=as_json)
        return
    folder = (output or ".") if several else None
    timeline = Path(trace) if trace is not None else None
    results = _run(requests, folder, timeline, quiet=quiet, as_json=as_json)
    _tell(results, folder=folder, name=status_name(spec), as_json=as_json, quiet=quiet)


def _number(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.UsageError(f"--{key}: 'auto' or a number, not {text!r}") from None


def _bill(requests: list[Request], *, several: bool, as_json: bool) -> None:
    """Print the bill of each slide; of several, one that cannot be run does not hide the others."""
    from tilepipe.cli.console import bill_text
    from tilepipe.pipeline.bill import bill

    bills: list[dict[str, Any]] = []
    refused = 0
    for request in requests:
        try:
            bills.append(bill(request))
        except TilepipeError as error:
            if not several:
                raise
            refused += 1
            bills.append({"slide": request.slide, "output": request.output, "error": str(error)})
            click.echo(f"Error: {error}", err=True)
        else:
            if not as_json:
                click.echo(bill_text(bills[-1]))
    if as_json:
        click.echo(json.dumps(bills if several else bills[0]))
    if refused:
        click.echo(f"{refused} of {len(bills)} slides would fail", err=True)
        raise SystemExit(1)


def _run(
    requests: list[Request], folder: str | None, trace: Path | None, *, quiet: bool, as_json: bool
) -> list[RunResult]:
    from tilepipe.cli.console import Console
    from tilepipe.pipeline.run import run_many
    from tilepipe.store import check_outside

    known: list[RunResult] = []

    def keep(result: RunResult) -> None:
        known.append(result)
        if folder is not None:
            write_status(folder, requests, known)

    if folder is not None:
        # Before the first slide, not after it, it shows that the table cannot stand there.
        check_outside(f"{folder.rstrip('/') or '/'}/{status_name(requests[0].spec)}")
        write_status(folder, requests, known)
    with Console(quiet=quiet, as_json=as_json, slides=len(requests)) as console:
        return run_many(requests, trace=trace, on_event=console, on_result=keep)


def write_status(folder: str, requests: list[Request], results: list[RunResult]) -> None:
    """Write a table into the folder of the outputs: a row a slide, whole or not at all."""
    from tilepipe.store import open_files

    by_slide = {(result.slide, result.output): result for result in results}
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["slide", "output", "state", "reason", "units", "seconds"])
    for request in requests:
        result = by_slide.get((request.slide, str(request.output)))
        if result is None:
            writer.writerow([request.slide, request.output, "waiting", "", "", ""])
            continue
        units = sum(row["done"] for row in result.summary.get("units", {}).values())
        seconds = result.summary.get("elapsed_s")
        writer.writerow([
            request.slide, request.output,
            result.state if result.ok else "failed",
            result.reason, units or "", f"{seconds:.2f}" if seconds else "",
        ])  # fmt: skip
    # A name may hold bytes that are no text.
    raw = table.getvalue().encode("utf-8", "surrogateescape")
    open_files(folder, of_stores=True).put(status_name(requests[0].spec), raw)


def _tell(
    results: list[RunResult], *, folder: str | None, name: str, as_json: bool, quiet: bool
) -> None:
    from tilepipe.cli.console import summary_text
    from tilepipe.pipeline.run import failure

    if as_json:
        facts = [
            {**result.summary, "slide": result.slide, "output": result.output,
             "state": result.state, "reason": result.reason}
            for result in results
        ]  # fmt: skip
        click.echo(json.dumps(facts if folder is not None else facts[0]))
    elif not quiet:
        for result in results:
            if result.ok:
                click.echo(summary_text(result.summary))
    broken = [result for result in results if not result.ok]
    if not broken:
        return
    if folder is None:
        error: TilepipeError = failure(broken[0])
        if as_json:
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(1)
        raise error
    for result in broken:
        click.echo(f"Error: {failure(result)}", err=True)
    click.echo(
        f"{len(broken)} of {len(results)} slides failed; the reasons stand in "
        f"{folder.rstrip('/')}/{name}, and the same command tries them again",
        err=True,
    )
    raise SystemExit(1)
