"""``tilepipe``: the group; loads a command's module only when that command is called."""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import os
import signal
import stat
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.malloc import one_arena

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("tilepipe.cli.run", "Segment slides: TIFF to OME-Zarr mask pyramid."),
    "ingest": ("tilepipe.cli.ingest", "Copy a slide into a chunked OME-Zarr."),
    "inspect": ("tilepipe.cli.inspect", "Say what a slide, store or weights file holds."),
    "verify": ("tilepipe.cli.verify", "Recompute places of a finished mask and compare."),
    "finish": ("tilepipe.cli.finish", "Build what is left of a job run in parts."),
    "models": ("tilepipe.cli.models", "List the networks: context, alignment, exactness."),
    "convert": ("tilepipe.cli.convert", "Turn a state dict into safetensors weights."),
    "train": ("tilepipe.cli.train", "Make weights from annotated images."),
    "evaluate": ("tilepipe.cli.evaluate", "Compare a mask with the truth."),
    "view": ("tilepipe.cli.view", "Look at results in the browser."),
    "export": ("tilepipe.cli.export", "GeoJSON, OME-TIFF, PNG, CSV, OME-Zarr 0.4."),
    "report": ("tilepipe.cli.report", "Write one self-contained HTML page about a result."),
    "bench": ("tilepipe.cli.bench", "Measure the pipeline against the bare network."),
}
"""Name → module with a click command called ``command``, and the line shown by ``--help``."""


_GOES_ON = "What was written is kept; the same command goes on from there."
AFTER_A_STOP = {
    "run": _GOES_ON,
    "ingest": _GOES_ON,
    "finish": _GOES_ON,
    "train": (
        "With --resume (not --overwrite) the same command goes on from the state that was "
        "saved last."
    ),
}
"""Command → what to do once it was interrupted; the others leave nothing to go on from."""


class LazyGroup(click.Group):
    """Lists commands without importing them; turns TilepipeError into one line and exit 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; of a name that is none, say which one is like it."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No such command {args[0][:80]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from COMMANDS alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; an interruption ends it with what comes next and exit code 130."""
        check_folder()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted(ctx.invoked_subcommand)
        except Exception as error:
            # A library that is interrupted while it is imported may make an error of its own of it
            # (pydantic does).
            if not _is_stopped or isinstance(error, TilepipeError | click.ClickException):
                raise
            interrupted(ctx.invoked_subcommand)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; any TilepipeError becomes one message on stderr and exit code 1."""
        open_closed_streams()
        one_arena()
        stop_on_signals()
        # The imports of torch and zarr leave a million objects that stay; looked through again and
        # again while they come, they take 2.15 s instead of 2.0.
        gc.set_threshold(20_000, 20, 20)
        try:
            return super().main(*args, **kwargs)
        except Exception as error:
            if isinstance(error, click.ClickException):
                raise
            fail(error)


def open_closed_streams() -> None:
    """Let what is closed of stdin, stdout and stderr (``2>&-``) lead nowhere.

    Else the next file that is opened has its number, and in it stands what a library says there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(handle, True)  # for worker processes
            setattr(sys, name, os.fdopen(handle, mode))


def check_folder() -> None:
    """Raise StoreError where the folder that the command runs in was removed.

    Each relative path would be found missing by itself, and torch's libraries end the process.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise StoreError(
            f"the current folder cannot be found ({error.strerror}): it was removed, or made anew "
            'under this shell; change into one that is there (cd "$PWD" if it was made anew)'
        ) from error


_is_stopped = False
"""Whether a signal has asked the command to stop."""


def stop_on_signals() -> None:
    """Let SIGTERM and a terminal that closes do what Ctrl-C does.

    So workers are ended and temporary files removed. Under nohup SIGHUP stays unheard.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    global _is_stopped
    _is_stopped = True
    del frame
    if number == signal.SIGHUP:
        leave_closed_terminal()
    raise KeyboardInterrupt


def leave_closed_terminal() -> None:
    """Let what is said on a terminal that is gone lead nowhere.

    Else the first word there, a bar's last, is an OSError in the middle of tidying up.
    """
    for number in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def interrupted(command: str | None) -> NoReturn:
    """Say what comes after an interruption and exit with 130."""
    try:
        click.echo(f"Interrupted. {AFTER_A_STOP.get(command or '', '')}".rstrip(), err=True)
        sys.stdout.flush()
    finally:
        # A forward in a thread cannot be stopped; nothing half-written can be left behind.
        os._exit(130)


def wants_debug() -> bool:
    """Tell whether ``--debug`` stands on the command line (or TILEPIPE_DEBUG is set)."""
    return "--debug" in sys.argv or bool(os.environ.get("TILEPIPE_DEBUG"))


def fail(error: Exception) -> None:
    """Print one clear error and exit: 1, or 130 after Ctrl-C."""
    if wants_debug():
        traceback.print_exception(error)
    message = str(error).strip() or type(error).__name__
    if not isinstance(error, TilepipeError):
        if isinstance(error, MemoryError):
            message = f"out of memory: {message}; try a smaller --unit, --tile or --workers"
        elif isinstance(error, OSError):
            named = f"{error.filename}: " if error.filename else ""
            message = f"{named}{error.strerror or error}"
        else:
            message = (
                f"unexpected {type(error).__name__}: {message}\n"
                "This is a bug in tilepipe; the same command with --debug shows where."
            )
    click.echo(f"Error: {message}", err=True)
    if "--json" in sys.argv:
        with suppress(OSError):  # What failed may be stdout itself.
            click.echo(json.dumps({"error": message, "kind": type(error).__name__}))
    try:
        sys.stdout.flush()
    except OSError:
        # What is left in its buffer would fail once more, as Python ends: exit code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilepipe")
def main() -> None:
    """Segment gigapixel images exactly, fast and in bounded memory.

    \b
    tilepipe run slide.tif --model unet      slide to OME-Zarr with a mask pyramid
    tilepipe view slide.zarr                 look at it
    tilepipe verify slide.zarr               prove that the tiled mask is the whole-image mask
    """  # noqa: D301 - click wants the character itself


if __name__ == "__main__":
    main()
