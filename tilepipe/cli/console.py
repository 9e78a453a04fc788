"""What a run shows: a live display on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from tilepipe.cli.steps import NowAndThen, duration, tell_machine
from tilepipe.errors import argument
from tilepipe.pipeline.events import Event, Finished, Note, Opened, Progress, Warned
from tilepipe.spec import LARGEST_PIXEL

if TYPE_CHECKING:
    from rich.live import Live


def size(count: float) -> str:
    """Return a byte count in the unit that reads best."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Slides:
    """How many of a run's slides have come to their end, and when the last may."""

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = self.failed = 0
        self._worked = 0
        self._clock = clock
        self._began_s = clock()

    def end(self, event: Finished) -> None:
        """Count a slide."""
        self.done += 1
        self.failed += event.state not in ("done", "part done")
        self._worked += not was_complete(event.summary)

    @property
    def left_s(self) -> float | None:
        """Seconds until all have ended, by those for which something was done; None before one."""
        if not self._worked:
            return None
        return (self._clock() - self._began_s) / self._worked * (self.total - self.done)

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        left = f", {duration(self.left_s)} left for all" if self.done < self.total else ""
        return f"{self.done} of {self.total} slides{failed}{left}"

    def to_json(self) -> dict[str, Any]:
        """Return the same for a program."""
        return {
            "total": self.total, "done": self.done, "failed": self.failed, "left_s": self.left_s,
        }  # fmt: skip


class Console:
    """Listens to a run and draws it on stderr; a context manager.

    ``slides`` is how many there are. ``as_json``: where it stands is told in lines of JSON, for a
    program.
    """

    def __init__(self, *, quiet: bool, as_json: bool = False, slides: int = 1) -> None:
        self._quiet = quiet
        self._as_json = as_json
        self._slides = Slides(slides)
        self._live: Live | None = None
        self._last: dict[str, Progress] = {}
        self._clock = NowAndThen(at_once=not as_json)

    def __enter__(self) -> Console:
        if not (self._quiet or self._as_json) and sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            self._live = Live(
                console=RichConsole(stderr=True), refresh_per_second=6, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Finished):
            self._slides.end(event)
        if isinstance(event, Warned):
            self._say(f"Warning: {event.slide}: {event.text}", always=True)
        elif self._quiet:
            return
        elif self._as_json:
            if isinstance(event, Progress) and self._clock.is_time():
                tell_machine(**asdict(event), slides=self._slides.to_json())
        elif isinstance(event, Note):
            self._say(f"{event.slide}: {event.text}")
        elif isinstance(event, Opened):
            resumed = event.plan.get("resumed", 0)
            more = f", {resumed} units found done" if resumed else ""
            self._say(f"{event.slide} -> {event.output}{more}")
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Finished):
            self._last.pop(event.slide, None)
            if self._slides.total > 1:
                self._say(f"{event.slide}: {end_of(event)}; {self._slides}")

    def _say(self, text: str, *, always: bool = False) -> None:
        if self._quiet and not always:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _progress(self, event: Progress) -> None:
        self._last[event.slide] = event
        if self._live is not None:
            self._live.update(self._table())
            return
        if self._clock.is_time():
            click.echo(plain_line(event), err=True)

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for slide, event in list(self._last.items())[:4]:
            table.add_row(
                slide[-48:],
                "",
                f"{event.mpix_per_s:.2f} MPix/s  left {duration(event.left_s)}  "
                f"elapsed {duration(event.elapsed_s)}  workers {event.workers}"
                + (f"  [red]failed {event.failed}[/red]" if event.failed else ""),
            )
            for stage in event.stages:
                bar = ProgressBar(total=max(1, stage.total), completed=stage.done, width=30)
                table.add_row(f"  {stage.name}", bar, f"{stage.done}/{stage.total} units")
        if self._slides.total > 1:
            bar = ProgressBar(total=self._slides.total, completed=self._slides.done, width=30)
            table.add_row("all", bar, str(self._slides))
        return table


def end_of(event: Finished) -> str:
    """Return in a few words how one of several slides ended."""
    if event.state not in ("done", "part done"):
        reasons = [event.summary.get("reason"), *_reasons(event.summary)]
        reason = next((str(reason) for reason in reasons if reason), "")
        return f"{event.state}: {reason}" if reason else event.state
    if was_complete(event.summary):
        return "was complete already"
    told = f"{event.state} in {duration(event.summary['elapsed_s'])}"
    return f"{told}, {event.summary['mpix_per_s']:.2f} MPix/s" if event.summary["px"] else told


def was_complete(summary: dict[str, Any]) -> bool:
    """Tell whether nothing was to be done: no px of a mask, no object, no unit of a pyramid."""
    rows = summary.get("units", {}).values()
    return not (summary.get("px") or any(row["done"] > row["resumed"] for row in rows))


def _reasons(summary: dict[str, Any]) -> list[str]:
    return [entry["reason"] for entry in summary.get("failed", [])]


def plain_line(event: Progress) -> str:
    """Return one line that says where a job stands."""
    stages = ", ".join(f"{stage.name} {stage.done}/{stage.total}" for stage in event.stages)
    failed = f", {event.failed} failed" if event.failed else ""
    return (
        f"{event.slide}: {stages} units{failed}; {event.mpix_per_s:.2f} MPix/s, "
        f"{duration(event.left_s)} left"
    )


def summary_text(summary: dict[str, Any]) -> str:
    """Return the closing lines of a run: what, where, how quick, what is in it, what next."""
    height, width = summary["extent"]
    if summary["state"] == "done" and was_complete(summary):
        return (
            f"done: {summary['output']} was complete already ({width} x {height} px)\n"
            f"  next: tilepipe view {argument(summary['output'])}"
        )
    if summary["px"]:
        what = (
            f"{summary['px'] / 1e6:.1f} MPix in {duration(summary['elapsed_s'])}, "
            f"{summary['mpix_per_s']:.2f} MPix/s"
        )
    else:  # objects of a mask that was there, or what was lost of a pyramid
        what = f"{_made(summary)} in {duration(summary['elapsed_s'])}; the rest was there already"
    lines = [f"{summary['state']}: {summary['output']}  ({width} x {height} px, {what})"]
    fractions = summary.get("class_fractions")
    if fractions:
        shown = sorted(fractions.items(), key=lambda entry: -entry[1])[:8]
        lines.append("  " + ", ".join(f"{name} {share:.2%}" for name, share in shown))
    if summary.get("instances") is not None:
        lines.append(f"  {summary['instances']} objects in {summary['label']}-instances")
    if summary.get("skipped_px"):
        skipped, tiles = summary["tiles_skipped"], summary["tiles"]
        lines.append(
            f"  {summary['skipped_px'] / summary['px']:.0%} of the px hold no tissue and were "
            f"skipped: {skipped} of {tiles + skipped} tiles and parts of others"
        )
    if checked := summary.get("skipped_checked_px"):
        lost = summary["skipped_lost_px"]
        lines.append(
            f"  {checked} of these px were run all the same: {lost / checked:.2%} of them "
            "would not be background"
        )
    if summary.get("not_finite_px"):
        lines.append(
            f"  {summary['not_finite_px']} px are NaN, infinite or beyond {LARGEST_PIXEL:g}, and "
            "were taken for 0"
        )
    if summary.get("units_redone_fp32"):
        lines.append(
            f"  numbers overflowed in {summary['units_redone_fp32']} units, which were computed "
            "again in fp32"
        )
    if summary.get("damaged_tiles"):
        lines.append(f"  {summary['damaged_tiles']} damaged tiles of the slide were filled")
    if summary.get("out_of_memory_events"):
        count = summary["out_of_memory_events"]
        times = "once" if count == 1 else f"{count} times"
        lines.append(
            f"  the device ran out of memory {times}; smaller batches and tiles went through"
        )
    lines.append(f"  next: tilepipe view {argument(summary['output'])}")
    return "\n".join(lines)


def _made(summary: dict[str, Any]) -> str:
    """Say which stages did something."""
    made = [name for name, row in summary["units"].items() if row["done"] > row["resumed"]]
    return ", ".join(made) or "nothing"


def bill_text(entry: dict[str, Any]) -> str:
    """Return the bill as people read it."""
    plan = entry["plan"]
    height, width = entry["extent"]
    settings = entry["settings"]
    planes = entry["probabilities_bytes"]
    share = f" ({size(planes)} of it probabilities)" if planes else ""
    lines = [
        f"{entry['slide']} -> {entry['output']}, label {entry['label']}",
        f"  level {entry['level']}: {width} x {height} px in {entry['units']} units of "
        f"{plan['unit_px']} px, {entry['tiles']} tiles",
        f"  tiles: {plan['mode']}, {plan['input_px']} px read, {plan['core_px']} px written, "
        f"halo {plan['halo_px']} px (overhead {entry['halo_overhead']:.2f})",
        f"  device: {settings['device']}, {settings['precision']}, {settings['backend']}, "
        f"batch {settings['batch']}",
        f"  about {size(entry['ram_bytes'])} of memory, {size(entry['disk_bytes'])} on disk"
        f"{share}, {duration(entry['seconds'])}",
    ]
    return "\n".join([*lines, *(f"  {note}" for note in entry["notes"])])
