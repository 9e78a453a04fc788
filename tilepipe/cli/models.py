"""``tilepipe models``: the networks, what they see, and whether tiling them is exact."""

from __future__ import annotations

import json
from typing import Any

import click

from tilepipe.cli import options


@click.command("models")
@options.json_option
@options.debug_option
def command(as_json: bool) -> None:
    """List the networks: parameters, context, alignment, and exact or why not.

    Contexts are measured by a probe, px per side; parameters are for 3 channels, 2 classes.
    """
    from tilepipe.models.listing import list_models

    rows = list_models()
    if as_json:
        click.echo(json.dumps(rows))
        return
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("name", "parameters", "context", "align", "exact"):
        table.add_column(name, justify="left" if name in ("name", "exact") else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            "-" if row["context_px"] is None else f"{row['context_px']} px",
            f"{row['alignment_px']} px",
            "yes" if row["exact"] else "no",
        )
    Console(soft_wrap=True).print(table)
    for row in rows:
        bundled = "; weights bundled" if row["bundled"] else ""
        click.echo(
            f"{row['name']}: {row['paper']}; paper: {row['paper_parameters']}; "
            f"{row['reason']}{bundled}"
        )
