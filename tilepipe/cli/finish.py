"""``tilepipe finish``: what no part of a job has done."""

from __future__ import annotations

import json

import click

from tilepipe.cli import options


@click.command("finish")
@click.argument("store")
@click.option("--label", help="Finish this label alone; default every label of the store.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(store: str, label: str | None, as_json: bool, quiet: bool) -> None:
    """Build what is left of STORE: units that no part has done, then the pyramids.

    For jobs run with --part I/N, on machines that do not know of each other.
    """
    from tilepipe.cli.console import Console, summary_text
    from tilepipe.pipeline.finish import finish

    with Console(quiet=quiet, as_json=as_json) as console:
        result = finish(store, label=label, on_event=console)
    if as_json:
        click.echo(json.dumps(result.summary))
    elif not quiet:
        click.echo(summary_text(result.summary))
