"""The verbs ``run`` and ``ingest``: one slide or many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tilepipe.errors import StoreError, TilepipeError, UnitsFailedError
from tilepipe.pipeline.context import forget
from tilepipe.pipeline.events import Finished, Note, OnEvent, Opened, Warned, ignore
from tilepipe.pipeline.lanes import lanes_of
from tilepipe.pipeline.prepare import Job, prepare
from tilepipe.pipeline.source import default_output
from tilepipe.pipeline.work import SlideWork, Span
from tilepipe.pipeline.worker import run_units
from tilepipe.schedule import Dag, Outcome
from tilepipe.schedule.cluster import connect
from tilepipe.schedule.stream import drive
from tilepipe.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Request:
    """One slide of a run."""

    slide: str
    output: str | None = None
    spec: JobSpec = field(default_factory=JobSpec)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of one slide."""

    slide: str
    output: str
    label: str | None
    state: str
    """done, part done, units failed, or failed."""
    reason: str
    summary: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return self.state in ("done", "part done")


class _Refused:
    """A slide that could not even be prepared; passes through the stream as a job of no units."""

    def __init__(self, result: RunResult, on_event: OnEvent) -> None:
        self.dag = Dag([])
        self.ticket = None
        self.result = result
        self._on_event = on_event

    def record(self, stage: int, outcome: Outcome) -> None:
        raise AssertionError("a job without units has no outcome")

    def close(self, reason: str | None) -> None:
        del reason
        self._on_event(
            Finished(
                self.result.slide, self.result.output, "failed", {"reason": self.result.reason}
            )
        )


def run_many(
    requests: Sequence[Request],
    *,
    segment: bool = True,
    trace: Path | None = None,
    on_event: OnEvent = ignore,
    on_result: Callable[[RunResult], None] = lambda _: None,
) -> list[RunResult]:
    """Run the jobs of several slides as one stream; one broken slide does not stop the others.

    All requests share the scheduler settings of the first. ``on_result`` is called with each
    RunResult as it is known. Raises ScheduleError if the scheduler is lost, StoreError at once if a
    ``trace`` could not be written.
    """
    if not requests:
        return []
    if trace is not None:
        _check_trace(trace)
    results: list[RunResult] = []
    works: list[SlideWork] = []
    spans: list[Span] = []

    def keep(result: RunResult) -> None:
        results.append(result)
        on_result(result)

    def end(work: SlideWork) -> None:
        """Let go of a job: of a thousand slides' networks and files only those at work are held."""
        works.remove(work)
        spans.extend(work.spans)
        _let_go(work)

    def jobs() -> Iterator[SlideWork | _Refused]:
        for request in requests:
            try:
                job = prepare(
                    request.slide,
                    request.output,
                    request.spec,
                    segment=segment,
                    trace=trace is not None,
                    on_event=on_event,
                )
            except (TilepipeError, OSError, MemoryError) as error:
                if len(requests) == 1:
                    raise
                refused = RunResult(
                    request.slide,
                    request.output or default_output(request.slide),
                    request.spec.name,
                    "failed",
                    str(error),
                    {},
                )
                keep(refused)
                yield _Refused(refused, on_event)
                continue
            on_event(Opened(request.slide, job.source.output, _plan_facts(job)))
            alone = len(requests) == 1
            work = _Kept(job, request, alone=alone, on_event=on_event, keep=keep, end=end)
            works.append(work)
            yield work

    def tick(workers: dict[str, int]) -> None:
        for work in works:
            work.look(workers)

    try:
        stream = jobs()
        # The first job is prepared before any worker is started: most mistakes show here.
        opened = [next(stream)]
        while isinstance(opened[-1], _Refused) and (more := next(stream, None)) is not None:
            opened.append(more)
        first = opened[-1]
        if len(requests) == 1 and first.dag.finished:
            first.close(None)
        else:
            _drive(requests, first, chain(opened, stream), tick, on_event)
    finally:
        for work in works:
            _let_go(work)
    if trace is not None:
        _write_trace(trace, spans)
    return results


def _drive(
    requests: Sequence[Request],
    first: SlideWork | _Refused,
    stream: Iterator[SlideWork | _Refused],
    tick: Callable[[dict[str, int]], None],
    on_event: OnEvent,
) -> None:
    """Run jobs on the workers that the first of them asks for."""
    spec, slide = requests[0].spec, requests[0].slide
    chosen = first.job.segmentation if isinstance(first, SlideWork) else None
    with connect(
        spec.scheduler,
        workers=spec.workers,
        gpus=spec.gpus,
        lanes=lanes_of(spec, chosen.settings if chosen is not None else None),
    ) as connection:
        if connection.dashboard:
            on_event(Note(slide, f"Dask dashboard: {connection.dashboard}"))
        if isinstance(first, SlideWork):
            first.begin()
        drive(
            connection,
            stream,
            run_units,
            retries=spec.retries,
            on_tick=tick,
            on_other=lambda text: on_event(Warned(slide, text)),
        )


class _Kept(SlideWork):
    """Hands its result on when it closes, and then itself."""

    def __init__(
        self,
        job: Job,
        request: Request,
        *,
        alone: bool,
        on_event: OnEvent,
        keep: Callable[[RunResult], None],
        end: Callable[[SlideWork], None],
    ) -> None:
        super().__init__(job, part=request.spec.part, on_event=on_event)
        self._request = request
        self._alone = alone
        self._keep = keep
        self._end = end

    def close(self, reason: str | None) -> None:
        try:
            super().close(reason)
        except (TilepipeError, OSError) as error:
            # Its store is gone or full: of several slides the others go on.
            if self._alone:
                raise
            self.state, self.summary = "failed", {}
            reason = reason or str(error)
            output = self.job.source.output
            self._on_event(Finished(self.job.source.name, output, "failed", {"reason": reason}))
        failed = self.summary.get("failed", ())
        told = reason or (failed[0]["reason"] if failed else "")
        self._keep(
            RunResult(
                # As they were asked for: who asked finds them again by that.
                self._request.slide,
                self._request.output or self.job.source.output,
                self.ticket.label,
                self.state,
                told,
                self.summary,
            )
        )
        self._end(self)


def _let_go(work: SlideWork) -> None:
    work.job.held.close()
    forget(work.ticket.output)


def run_one(
    request: Request,
    *,
    segment: bool = True,
    on_event: OnEvent = ignore,
) -> RunResult:
    """Run one slide's job.

    Raises UnitsFailedError, with the reasons, if units kept failing: the store then says
    ``units failed``, what is done is kept, and the same call goes on.
    """
    results = run_many([request], segment=segment, on_event=on_event)
    result = results[0]
    if not result.ok:
        raise failure(result)
    return result


def failure(result: RunResult) -> TilepipeError:
    """Return the error that tells what of a job failed, and that the rest is kept."""
    summary = result.summary
    failed, blocked = summary.get("n_failed", 0), summary.get("n_blocked", 0)
    if result.state == "failed" or not failed:
        return StoreError(result.reason)
    lines = [
        f"{entry['stage']} level {entry['level']} unit {tuple(entry['unit'])} "
        f"({entry['box']}): {entry['reason']}"
        for entry in summary["failed"][:5]
    ]
    more = f"\n  … and {failed - 5} more" if failed > 5 else ""
    return UnitsFailedError(
        f"{result.slide}: {failed} units failed"
        + (f", {blocked} wait for them" if blocked else "")
        + f"; the rest is kept in {result.output} and the same command tries these again:\n  "
        + "\n  ".join(lines)
        + more
    )


def _plan_facts(job: Job) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "units": {f"{s.name} {s.level}": len(s.grid) for s in job.stages},
        "extent": list(job.source.extents[0]),
        "resumed": sum(len(list(done)) for done in job.recorded.values()),
    }
    if job.segmentation is not None:
        facts["label"] = job.segmentation.name
        facts["settings"] = job.segmentation.settings.to_json()
        facts["weights"] = job.segmentation.model.source
    return facts


def _check_trace(path: Path) -> None:
    """Find out before the job, not after it, that there is no place for its timeline."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise StoreError(
            f"{path}: the trace could not be written, {path.parent} is no folder that can be "
            "written to; make it first, or name another --trace"
        )
    # The same command is given again after a stop, and then writes over the trace it wrote.
    if path.is_dir() or (path.is_file() and not _is_trace(path)):
        raise StoreError(
            f"{path}: is there already and is no trace, it is left alone; name another --trace"
        )


_TRACE_HEAD = b'{"traceEvents":'


def _is_trace(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_TRACE_HEAD)) in (_TRACE_HEAD, b"")
    except OSError as error:
        raise StoreError(f"{path}: the trace cannot be written: {error.strerror}") from error


def _write_trace(path: Path, spans: Sequence[Span]) -> None:
    """Write a timeline that chrome://tracing and Perfetto open."""
    origin_s = min((span[1] for _, span in spans), default=0.0)
    workers = sorted({worker for worker, _ in spans})
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": n, "args": {"name": worker}}
        for n, worker in enumerate(workers)
    ]
    events += [
        {
            "name": name,
            "ph": "X",
            "ts": (start_s - origin_s) * 1e6,
            "dur": seconds * 1e6,
            "pid": workers.index(worker),
            "tid": thread,
        }
        for worker, (name, start_s, seconds, thread) in spans
    ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise StoreError(f"{path}: the trace cannot be written: {error.strerror}") from error
