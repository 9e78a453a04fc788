"""``tilepipe report``: one HTML page about a result."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tilepipe.cli import options
from tilepipe.cli.masks import check_masks


@click.command("report")
@click.argument("store")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Page to write.",
)
@click.option("--label", "labels", multiple=True, help="Label to report; repeatable; default all.")
@click.option("--overwrite", is_flag=True, help="Replace the page if it is there.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(
    store: str,
    output: Path,
    labels: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write one self-contained page about STORE: picture, areas, objects, plan, certificate."""
    from tilepipe.cli.steps import progress
    from tilepipe.export.report import write_report
    from tilepipe.store import open_store

    opened = open_store(store)
    shown = [opened.label(name) for name in labels or opened.labels]
    check_masks(opened, shown, image=True, quiet=quiet)
    with progress(store, quiet=quiet, as_json=as_json) as tell:
        told = write_report(output, opened, labels=labels or None, overwrite=overwrite, tell=tell)
    if as_json:
        click.echo(json.dumps({"output": str(output), "labels": told}, default=str))
    elif not quiet:
        click.echo(f"{output}: {', '.join(one['label'] for one in told)}")
