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
@options.slide_mpp_option
@options.unit_option
@options.workers_option
@options.scheduler_option
@options.ome_zarr_option
@options.on_damage_option
@options.max_pixels_option
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
