"""``tilepipe bench``: how much of the bare network's speed the whole pipeline reaches."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from tilepipe.cli import options
from tilepipe.cli.steps import tell_machine


@click.command("bench")
@click.option("--model", default="unet", show_default=True, help="Architecture.")
@click.option("--weights", default="random:0", show_default=True, help="File, or random:SEED.")
@click.option("--base", type=int, help="Channels of the first level, for random weights.")
@click.option("--size", type=click.IntRange(min=64), default=4096, show_default=True,
              help="Side of the slide that is made, px.")  # fmt: skip
@click.option("--slide", type=click.Path(exists=True, dir_okay=True), help="A slide of your own.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto",
              show_default=True, help="Of the network, bare and in the pipeline.")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "torch", "openvino"]), default="auto",
              show_default=True, help="What runs it.")  # fmt: skip
@click.option("--tile", type=int, help="Input side of a tile, px.")
@click.option("--batch", type=int, help="Tiles per forward.")
@click.option("--unit", type=int, help="Side of a write unit, px.")
@click.option("--workers", type=int, help="Worker processes of the pipeline.")
@click.option("--gpus", help="Repeat on so many devices, e.g. 1,2,4.")
@click.option("--in-place", is_flag=True, help="Do not copy the image.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True,
              help="Pipeline and bare network in turns; the best of each counts.")  # fmt: skip
@click.option("--no-tune", is_flag=True, help="Use formulas, measure nothing.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False),
              help="Where slide and store are made; default the system's.")  # fmt: skip
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False),
    help="Draw the account: PNG, SVG or PDF.",
)
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    size: int,
    slide: str | None,
    gpus: str | None,
    folder: str | None,
    rounds: int,
    plot_path: str | None,
    as_json: bool,
    quiet: bool,
    no_tune: bool,
    **settings: Any,
) -> None:
    """Measure the bare network, the engine from memory and the whole pipeline.

    The pipeline reads a JPEG slide and closes a store with both pyramids. Its share of the bare
    network's best speed in the same precision, and where the rest of the time went, are shown.
    """
    from tilepipe.bench.plot import check_plot, plot
    from tilepipe.bench.run import bench
    from tilepipe.errors import SpecError
    from tilepipe.spec import JobSpec

    given = {key: value for key, value in settings.items() if value is not None}
    spec = JobSpec.checked({**given, "tune": not no_tune}, source="options")
    try:
        counts = tuple(int(count) for count in gpus.split(",")) if gpus else ()
        if any(count < 1 for count in counts):
            raise ValueError
    except ValueError:
        raise SpecError(f"--gpus {gpus}: say how many devices, e.g. --gpus 1,2,4") from None
    if plot_path is not None:
        check_plot(Path(plot_path))
    result = bench(
        spec,
        size_px=size,
        slide=Path(slide) if slide else None,
        folder=Path(folder) if folder else None,
        gpus=counts,
        rounds=rounds,
        tell=partial(_tell, quiet=quiet, as_json=as_json),
    )
    # First of all, as the plot may fail.
    if as_json:
        click.echo(json.dumps(result))
    elif not quiet:
        click.echo(table(result))
    if plot_path is not None:
        plot(result, Path(plot_path))


def _tell(text: str, *, quiet: bool, as_json: bool) -> None:
    if quiet:
        return
    if as_json:
        tell_machine(what=text)
    else:
        click.echo(f"… {text}", err=True)


def table(result: dict[str, Any]) -> str:
    """Return the result as people read it."""
    settings, best = result["settings"], result["bare_best"]
    lines = [
        f"{result['model']['name']} on {result['machine']['device_name']}, "
        f"{result['extent'][1]} x {result['extent'][0]} px",
        f"  settings             {settings['backend']} {settings['precision']}, "
        f"tile {settings['plan']['input_px']} px, batch {settings['batch']}",
        f"  bare network         {result['bare_mpix_per_s']:8.2f} MPix/s  "
        f"({best['backend']} {best['precision']}, tile {best['input_px']} px)",
        f"{'':<24}{result['bare_matrix_share']:.0%} of the device's "
        f"{result['matrix_tflops']:.3g} TFLOP/s in torch's products of matrices",
        f"  engine, from memory  {result['engine_mpix_per_s']:8.2f} MPix/s",
        f"  pipeline             {result['pipeline_mpix_per_s']:8.2f} MPix/s  "
        f"{result['pipeline_share']:.1%} of the bare network",
        *_rounds(result["rounds"]),
        f"  pipeline with start  {result['cold_mpix_per_s']:8.2f} MPix/s",
        f"  peak memory          {result['peak_rss_bytes'] / 1e9:8.2f} GB",
        "  where the lanes' time went:",
    ]
    shares = result["account"]["shares"]
    lines += [f"    {step:<18} {share:6.1f} %" for step, share in shares.items()]
    if result["account"]["device_busy"] is not None:
        lines.append(f"  the device computed {result['account']['device_busy']:.1%} of the time")
    lines += [
        f"  {entry['gpus']} devices: {entry['mpix_per_s']:.2f} MPix/s, "
        f"efficiency {entry['efficiency']:.1%}"
        for entry in result["scaling"]
    ]
    return "\n".join(lines)


def _rounds(turns: list[dict[str, Any]]) -> list[str]:
    """Say how far apart the rounds were, where there were several."""
    if len(turns) < 2:
        return []
    each = ", ".join(
        f"{turn['pipeline_mpix_per_s']:.2f} ({turn['bare_mpix_per_s']:.2f})" for turn in turns
    )
    return [f"{'':<24}each round (and the bare network after it): {each}"]
