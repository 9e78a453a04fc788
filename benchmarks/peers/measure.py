"""Run one program as a process: seconds, the highest memory of it and its children, its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a process."""

    ok: bool
    wall_s: float
    peak_bytes: int | None
    report: dict[str, Any] = field(default_factory=dict)
    """The last line of its output."""
    reason: str = ""


def run(
    command: list[str], *, log: Path, folder: Path, timeout_s: float, env: dict[str, str]
) -> Run:
    """Run ``command`` in ``folder`` to its end or until ``timeout_s``; errors go to ``log``."""
    output = log.with_suffix(".out")
    peak: int | None = None
    with output.open("w", encoding="utf-8") as out, log.open("w", encoding="utf-8") as err:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env=env, start_new_session=True, cwd=folder
        )
        reason = ""
        while True:
            try:
                code = process.wait(timeout=SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                found = resident_bytes(process.pid)
                peak = found if peak is None else max(peak, found or 0)
            if time.perf_counter() - started_s > timeout_s:
                os.killpg(process.pid, signal.SIGKILL)
                code, reason = process.wait(), f"stopped after {timeout_s:.0f} s"
                break
        wall_s = time.perf_counter() - started_s
    report: dict[str, Any] = {}
    lines = output.read_text(encoding="utf-8").strip().splitlines()
    if code == 0:
        try:
            report = json.loads(lines[-1])
        except (IndexError, ValueError):
            reason = f"its last line is no report; see {output}"
    elif not reason:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] or [f"exit {code}"]
        reason = f"{last[0][:300]}; see {log}"
    return Run(not reason, wall_s, peak, report, reason)


def resident_bytes(pid: int) -> int | None:
    """Sum the resident memory of a process and its descendants; None where /proc is not there.

    Pages that processes share are counted in each.
    """
    try:
        total = _resident(pid)
    except (OSError, ValueError, IndexError):
        return None
    for child in _children(pid):
        total += resident_bytes(child) or 0
    return total


def _resident(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return found  # it ended meanwhile
    return found
