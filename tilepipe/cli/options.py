"""Options that more than one command has, declared once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


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
