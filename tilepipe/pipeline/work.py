"""``SlideWork``: one slide's job in the stream: its graph, its progress, its closing record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from tilepipe.errors import StoreError
from tilepipe.infer.account import account_json, merge_seconds
from tilepipe.pipeline.events import Finished, OnEvent, Progress, StageProgress
from tilepipe.pipeline.instances import close_instances
from tilepipe.pipeline.job import GATE, INGEST, LABEL_REDUCE, REDUCE, SEGMENT, Ticket
from tilepipe.pipeline.prepare import Job
from tilepipe.pipeline.stages import stage_word
from tilepipe.schedule import Dag, Outcome
from tilepipe.schedule.local import LANES
from tilepipe.spec import distinct_names
from tilepipe.store import Journal, fit_windows

MOST_FAILURES_LISTED = 100
MOST_DAMAGE_LISTED = 1000
_OF_TISSUE = (
    "tiles", "tiles_skipped", "skipped_px", "skipped_checked_px", "skipped_lost_px",
)  # fmt: skip
"""What the record of a unit tells of what was skipped as empty."""
_OF_NUMBERS = {"redone_fp32": "units_redone_fp32", "not_finite_px": "not_finite_px"}
"""What it tells of numbers that could not be used as they were, and how the summary calls it."""
Span = tuple[str, tuple[str, float, float, int]]
"""A worker; what it did, when it began, the seconds it took, its thread."""


class SlideWork:
    """A prepared job as the stream runs it."""

    def __init__(self, job: Job, *, part: str | None, on_event: OnEvent) -> None:
        self.job = job
        self.ticket: Ticket = job.ticket
        self.dag = Dag(job.stages)
        wanted = part_of(job, part) if part is not None else None
        recorded: Mapping[int, Iterable[int]] = job.recorded
        if wanted is not None and job.ticket.spec.get("overwrite"):
            recorded = {
                number: set(units) - wanted[number] if job.stages[number].name == SEGMENT else units
                for number, units in recorded.items()
            }
        self.dag.start(recorded, wanted)
        self._on_event = on_event
        self._at_start = [self.dag.count(number)[0] for number in range(len(job.stages))]
        self._started_s = time.perf_counter()
        self._told_s = 0.0
        self._px = 0
        self._seconds: dict[str, float] = {}
        self._device_s = 0.0
        self._facts: Counter[str] = Counter()
        self._workers: set[str] = set()
        self._threads: dict[str, int] = {}
        """Of all workers seen so far, by address."""
        self.spans: list[Span] = []
        self.state = "running"
        self.reason: str | None = None
        self.summary: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the clock: workers are there. What they take to come is no slide's time."""
        self._started_s = time.perf_counter()

    # -- the stream's side ---------------------------------------------------------------------

    def record(self, stage: int, outcome: Outcome) -> None:
        """Add up what a done unit tells."""
        facts = outcome.facts
        self._workers.add(outcome.worker)
        self._seconds = merge_seconds([self._seconds, facts.get("seconds", {})])
        self._device_s += float(facts.get("device_s", 0.0))
        if self.dag.stages[stage].name == (SEGMENT if self.job.segmentation else INGEST):
            self._px += int(facts.get("px", 0))
        for fact in (*_OF_TISSUE, *_OF_NUMBERS, "oom"):
            self._facts[fact] += int(facts.get(fact, 0))
        self.spans += [(outcome.worker, span) for span in outcome.spans]
        self.tell(len(self._workers))

    def look(self, workers: Mapping[str, int]) -> None:
        """See who works now (addresses → threads) and report progress."""
        self._threads.update(workers)
        self.tell(len(workers))

    def tell(self, workers: int, *, now: bool = False) -> None:
        """Report progress, at most four times a second."""
        clock_s = time.perf_counter()
        if not now and clock_s - self._told_s < 0.25:
            return
        self._told_s = clock_s
        elapsed_s = clock_s - self._started_s
        stages = self._stage_progress()
        main = "segment" if self.job.segmentation else "ingest"
        left = None
        for stage in stages:
            if stage.name == main and stage.done > stage.at_start:
                left = elapsed_s / (stage.done - stage.at_start) * (stage.total - stage.done)
        self._on_event(
            Progress(
                slide=self.job.source.name,
                stages=stages,
                elapsed_s=elapsed_s,
                mpix_per_s=self._px / 1e6 / max(elapsed_s, 1e-9),
                left_s=left,
                failed=len(self.dag.failed),
                workers=workers,
            )
        )

    def _stage_progress(self) -> tuple[StageProgress, ...]:
        rows: dict[str, list[int]] = {}
        for number, stage in enumerate(self.dag.stages):
            done, total = self.dag.count(number)
            row = rows.setdefault(stage_word(stage), [0, 0, 0])
            for place, value in enumerate((done, total, self._at_start[number])):
                row[place] += value
        return tuple(StageProgress(name, *row) for name, row in rows.items())

    def close(self, reason: str | None) -> None:
        """Write the closing record: done only if every unit is."""
        self.reason = reason
        elapsed_s = time.perf_counter() - self._started_s
        finished = self.dag.finished and reason is None
        failures = [
            {
                "stage": self.dag.stages[number].name,
                "level": self.dag.stages[number].level,
                "unit": list(divmod(index, self.dag.stages[number].grid.shape[1])),
                "box": str(self.dag.stages[number].grid.at(index).box),
                "reason": text,
            }
            for (number, index), text in sorted(self.dag.failed.items())
        ]
        if finished:
            self.state = "done" if not self.dag.skipped else "part done"
        else:
            self.state = "units failed"
        lanes = sum(self._threads.get(worker, LANES) for worker in self._workers) or LANES
        self.summary = {
            "slide": self.job.source.name,
            "output": self.job.source.output,
            "label": self.ticket.label,
            "state": self.state,
            "extent": list(self.job.source.extents[self.ticket.level]),
            "px": self._px,
            "elapsed_s": elapsed_s,
            "mpix_per_s": self._px / 1e6 / max(elapsed_s, 1e-9),
            "units": {
                row.name: {"done": row.done, "total": row.total, "resumed": row.at_start}
                for row in self._stage_progress()
            },
            "failed": failures[:MOST_FAILURES_LISTED],
            "n_failed": len(failures),
            "n_blocked": self.dag.blocked,
            "damaged_tiles": 0,
            "out_of_memory_events": self._facts["oom"],
            **{fact: self._facts[fact] for fact in _OF_TISSUE},
            **{word: self._facts[fact] for fact, word in _OF_NUMBERS.items()},
            "account": account_json(
                self._seconds,
                wall_s=elapsed_s,
                lanes=lanes,
                device_s=self._device_s,
                devices=max(1, len(self._workers)),
            ),
        }
        self._write_records(finished)
        if finished:
            with suppress(StoreError):  # what killed workers left; it is in nobody's way
                self.job.store.clean_partial()
        self.tell(len(self._workers), now=True)
        self._on_event(
            Finished(self.job.source.name, self.job.source.output, self.state, self.summary)
        )

    def _check_current(self) -> None:
        """Raise MismatchError where another job has begun anew: its records are its own."""
        ticket, store = self.ticket, self.job.store
        if self.job.source.store is None:
            store.check_current(store.journal(None, ticket.image_fingerprint))
        if ticket.label is not None:
            store.check_current(store.journal(ticket.label, ticket.label_fingerprint))

    def _write_records(self, finished: bool) -> None:
        job, store = self.job, self.job.store
        self._check_current()
        closing = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if job.source.store is None and any(s.name in (INGEST, REDUCE) for s in job.stages):
            record = store.read_record()
            image_done = all(
                self.dag.count(number)[0] == len(stage.grid)
                for number, stage in enumerate(job.stages)
                if stage.name in (INGEST, REDUCE)
            )
            damage = damage_told(store.journal(None, self.ticket.image_fingerprint), INGEST)
            self.summary["damaged_tiles"] = damage["n_damaged"]
            # `finish` may have been begun before this part was over, and have done all the rest.
            image_done |= finished and record.get("state") == "done"
            state = "done" if image_done else "units failed" if not finished else "running"
            told = {"state": state, **damage}
            if any(record.get(key) != value for key, value in told.items()):
                if state == "done":
                    fit_windows(store)
                store.write_record({**record, **told})
        elif store.has_image:  # of what was copied before, its record tells
            self.summary["damaged_tiles"] = store.read_record().get("n_damaged", 0)
        if job.segmentation is None or self.ticket.label is None:
            return
        label = store.label(self.ticket.label)
        counts: Counter[str] = Counter()
        journal = store.journal(self.ticket.label, self.ticket.label_fingerprint)
        # By runs before this, too.
        skipped: Counter[str] = Counter(dict.fromkeys(_OF_TISSUE, 0))
        numbers: Counter[str] = Counter()
        for kept in journal.recorded(SEGMENT, 0).values():
            counts.update(kept.facts.get("counts", {}))
            skipped.update({key: int(kept.facts.get(key, 0)) for key in _OF_TISSUE})
            numbers.update({key: int(kept.facts.get(key, 0)) for key in _OF_NUMBERS})
        self.summary |= {word: numbers[fact] for fact, word in _OF_NUMBERS.items()}
        total = sum(counts.values())
        names = distinct_names([entry.name for entry in label.classes])
        self.summary["class_px"] = {
            name: int(counts[str(value)]) for value, name in enumerate(names)
        }
        self.summary["class_fractions"] = {
            name: px / total if total else 0.0 for name, px in self.summary["class_px"].items()
        }
        record = label.read_record()
        is_all_done = self.state == "part done" and record.get("state") == "done"  # as above
        state = "done" if is_all_done else self.state
        updated = {
            "state": state,
            "failed": self.summary["failed"],
            "n_failed": self.summary["n_failed"],
            "finished": closing,
            "units": self.summary["units"],
            "class_px": self.summary["class_px"],
            "tissue": dict(skipped),
        }
        fresh = any(
            self.dag.count(number)[0] > self._at_start[number]
            for number, stage in enumerate(job.stages)
            if stage.name in (INGEST, REDUCE, GATE, SEGMENT, LABEL_REDUCE)
        )
        if job.source.slide is not None and not store.has_image:  # read by the mask's units
            damage = damage_told(journal, GATE, SEGMENT)
            self.summary["damaged_tiles"] = damage["n_damaged"]
            updated |= damage if damage["n_damaged"] else {}
        if fresh:  # objects found later do not change how fast the mask was made
            updated |= {key: self.summary[key] for key in ("account", "mpix_per_s")}
        # A run that finds all done, and told, changes nothing: one that was killed after its last
        # unit has told nothing of it (test_resume.py).
        if fresh or any(record.get(key) != updated[key] for key in ("state", "class_px")):
            label.write_record({**record, **updated})
        if self.ticket.instances is not None:
            self.summary["instances"] = close_instances(
                store,
                self.ticket.label,
                self.ticket.instances_fingerprint,
                state=self.state,
                units={
                    name: self.summary["units"][name]
                    for name in ("find objects", "join objects", "instances", "instance pyramid")
                    if name in self.summary["units"]
                },
                failed=self.summary["failed"],
            )


def damage_told(journal: Journal, *stages: str) -> dict[str, Any]:
    """Return what the units of stages that read the slide tell of it: tiles filled, and how many.

    At most ``MOST_DAMAGE_LISTED`` are named.
    """
    named: set[str] = set()
    count = 0
    for stage in stages:
        facts = [kept.facts for kept in journal.recorded(stage, 0).values()]
        named.update(str(tile) for each in facts for tile in each.get("damaged", ()))
        count = max(count, sum(int(each.get("n_damaged", 0)) for each in facts))
    return {"damaged": sorted(named)[:MOST_DAMAGE_LISTED], "n_damaged": max(count, len(named))}


def part_of(job: Job, part: str) -> dict[int, set[int]]:
    """Units of part ``I/N``: its share of the mask's units and the image units they read.

    What builds the rest of the pyramids is ``finish``: no part can know when the others are done.
    """
    share, total = (int(number) for number in part.split("/"))
    segment = next((n for n, stage in enumerate(job.stages) if stage.name == SEGMENT), 0)
    count = len(job.stages[segment].grid)
    wanted: dict[int, set[int]] = {number: set() for number in range(len(job.stages))}
    todo = [(segment, i) for i in range(share * count // total, (share + 1) * count // total)]
    while todo:
        number, index = todo.pop()
        if index in wanted[number]:
            continue
        wanted[number].add(index)
        stage = job.stages[number]
        todo.extend(stage.needs(stage.grid.at(index)))
        if stage.after is not None and not wanted[stage.after]:
            todo.extend((stage.after, i) for i in range(len(job.stages[stage.after].grid)))
    return wanted
