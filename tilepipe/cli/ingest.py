"""``tilepipe ingest``: the first stage alone."""

from __future__ import annotations

import json
from typing import Any

import click

from tilepipe.cli import options
from tilepipe.spec import JobSpec


@click.command("ingest")
@click.argument("slide")
@click.option("-o", "--output", help="The store; default the slide's name with .zarr.")
@click.option("--slide-mpp", type=float, help="µm/px of the slide, when its tags do not say.")
@click.option("--unit", type=int, help="Side of a write unit (a shard), px.")
@click.option("--workers", type=int, help="Worker processes on this machine.")
@click.option("--scheduler", help="local, tcp://HOST:PORT, tls://HOST:PORT or a scheduler file.")
@click.option("--ome-zarr", type=click.Choice(["0.5", "0.4"]), help="Version of the output.")
@click.option(
    "--on-damage",
    type=click.Choice(["error", "fill"]),
    help="A damaged tile of the slide: an error, or filled and counted.",
)
@click.option("--max-pixels", type=int, help="Largest declared size believed (default 2^40).")
@click.option("--overwrite", is_flag=True, default=None, help="Make the output anew.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(slide: str, output: str | None, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Copy SLIDE into a chunked OME-Zarr, bit for bit, with its pyramid."""
    from tilepipe.cli.console import Console, summary_text
    from tilepipe.pipeline.run import Request, run_one

    given = {key: value for key, value in flags.items() if value is not None}
    spec = JobSpec.checked(given, source="ingest")
    with Console(quiet=quiet, as_json=as_json) as console:
        result = run_one(Request(slide, output, spec), segment=False, on_event=console)
    if as_json:
        click.echo(json.dumps(result.summary))
    elif not quiet:
        click.echo(summary_text(result.summary))
