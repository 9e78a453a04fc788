"""Options that more than one command has, declared once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


slide_mpp_option = click.option(
    "--slide-mpp", type=float, help="µm/px of the slide, when its tags do not say."
)
unit_option = click.option(
    "--unit", type=int, help="Side of a write unit (a shard), px; default 2048 or 4096."
)
workers_option = click.option("--workers", type=int, help="Worker processes on this machine.")
scheduler_option = click.option(
    "--scheduler", help="local (default), tcp://HOST:PORT, tls://HOST:PORT or a scheduler file."
)
ome_zarr_option = click.option(
    "--ome-zarr", type=click.Choice(["0.5", "0.4"]), help="Version of the output (default 0.5)."
)
on_damage_option = click.option(
    "--on-damage",
    type=click.Choice(["error", "fill"]),
    help="A damaged tile of the slide: an error (default), or filled and counted.",
)
max_pixels_option = click.option(
    "--max-pixels", type=int, help="Largest declared size believed (default 2^40)."
)


class Sectioned(click.Command):
    """A command of many options, whose help lists them under headings.

    ``sections``: heading → names of options, without dashes, in the order in which they are told;
    those that it does not name come last, under "Other".
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = {heading: names.split() for heading, names in sections.items()}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by sections."""
        told: dict[str, tuple[str, str]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Option) and record is not None:
                told[max(param.opts, key=len).lstrip("-")] = record
        for heading, names in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([told.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(told.values()))


def json_option(command: Command) -> Command:
    """``--json``: the same facts for machines, as JSON on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def quiet_option(command: Command) -> Command:
    """``--quiet``: print nothing but errors."""
    return click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")(command)


def debug_option(command: Command) -> Command:
    """``--debug``: show tracebacks (read by ``main`` itself)."""
    return click.option(
        "--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors."
    )(command)


def key_values(pairs: Iterable[str]) -> dict[str, Any]:
    """Return what ``--option KEY=VALUE`` says; a value is JSON or TOML where it is that, else text.

    Raises UsageError for what is no pair, and for a number that is none.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise click.UsageError(f"--option {pair}: give KEY=VALUE")
        value = _value(text)
        if not _is_plain(value):
            raise click.UsageError(f"--option {pair}: words, lists and finite numbers are taken")
        found[key.strip()] = value
    return found


def _is_plain(value: Any) -> bool:
    """Tell whether a value is JSON of finite numbers, and no word that Python takes for another."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return False
    try:
        return not isinstance(value, str) or math.isfinite(float(value))
    except ValueError:
        return True


def _value(text: str) -> Any:
    import tomllib

    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
