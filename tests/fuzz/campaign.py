"""``python -m tests.fuzz.campaign -n N``: seeded fuzzing in a worker process with limits.

Every execution is told by its target and seed: ``--only TARGET --first SEED -n 1`` repeats it.
Prints one line per target and exits with 1 if anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"tiff": 18, "store": 6, "store04": 6, "journal": 30, "job": 25, "checkpoint": 15}
"""Percent of all executions; the costly ones get few."""
BATCH = 50
WALL_FACTOR = 30
"""On a busy machine seconds pass without work: a hang is SECONDS of processor time, or this many
times SECONDS on the clock."""


class Worker:
    """The process that executes; a fresh one is started when it died or was killed."""

    def __init__(self, *, seconds, megabytes):
        self.seconds = seconds
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        environment = {**os.environ, "FUZZ_MB": str(megabytes), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            cwd=ROOT, env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        )  # fmt: skip
        self._left = b""

    def batch(self, target, first, count):
        """Yield the record of each execution; the last one says if the process is gone."""
        try:
            self.process.stdin.write(f"{target} {first} {count}\n".encode())
        except BrokenPipeError:
            yield self._gone(target, first)
            return
        seed, running = first, False
        while True:
            line = self._line(running)
            if line is None:
                yield self._gone(target, seed)
                return
            if line.startswith("> "):
                seed, running = int(line.split()[2]), True
            elif line.startswith("="):
                return
            else:
                running = False
                yield json.loads(line)

    def _line(self, running):
        """The next line; None if the process ended or hangs (it is killed then)."""
        began, cpu = time.monotonic(), self._cpu_s()
        while b"\n" not in self._left:
            # Importing libraries takes its time, too; only an execution has the short limit.
            limit = self.seconds if running else 120
            ready, _, _ = select.select([self.process.stdout], [], [], 0.2)
            if ready:
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    self.process.wait()
                    return None
                self._left += piece
            elif self._cpu_s() - cpu > limit or time.monotonic() - began > WALL_FACTOR * limit:
                self.process.kill()
                self.process.wait()
                self.hung = True
                return None
        line, _, self._left = self._left.partition(b"\n")
        return line.decode()

    hung = False

    def _cpu_s(self):
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _gone(self, target, seed):
        self._stderr.seek(0)
        told = self._stderr.read().decode(errors="replace").strip().splitlines()
        if self.hung:
            detail = f"hangs: more than {self.seconds:g} s"
        else:
            detail = f"the process died ({self.process.poll()}): {' | '.join(told[-12:])[:800]}"
        return {"target": target, "seed": seed, "outcome": "gone", "detail": detail}

    def close(self):
        """End the process."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()


class Fuzzer:
    """Executions of any target, in one worker for as long as it lives."""

    def __init__(self, *, seconds, megabytes):
        self._limits = {"seconds": seconds, "megabytes": megabytes}
        self._worker = None

    def run(self, target, *, first, count, tell):
        """Run ``count`` executions of a target; ``tell`` gets the record of each."""
        seed, end = first, first + count
        while seed < end:
            self._worker = self._worker or Worker(**self._limits)
            for record in self._worker.batch(target, seed, min(BATCH, end - seed)):
                seed = record["seed"] + 1
                gone = record["outcome"] == "gone"
                tell({**record, "outcome": "finding"} if gone else record)
                if gone:
                    self.close()

    def close(self):
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class Tally:
    """What the executions of one target came to."""

    def __init__(self, out):
        self.outcomes: Counter[str] = Counter()
        self._out = out
        self._peak_mb = self._slowest_s = 0.0

    def __call__(self, record):
        """Count an execution; a finding is printed and kept."""
        self.outcomes[record["outcome"]] += 1
        self._peak_mb = max(self._peak_mb, record.get("grown_mb", 0))
        self._slowest_s = max(self._slowest_s, record.get("seconds", 0))
        if record["outcome"] != "finding":
            return
        print(f"FINDING {record['target']} seed {record['seed']}: {record['detail']}", flush=True)
        if self._out is not None:
            with (self._out / "findings.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def __str__(self):
        outcomes = self.outcomes
        return (
            f"{outcomes.total()} executions, {outcomes['ok']} ok, {outcomes['refused']} refused, "
            f"{outcomes['finding']} findings; slowest {self._slowest_s:.2f} s of processor, "
            f"memory +{self._peak_mb:.0f} MB"
        )


def main(arguments=None):
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="executions over all targets")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--only", choices=[*SHARES, "planted"], help="one target alone")
    parser.add_argument("--out", type=Path, help="folder for findings.jsonl")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one execution")
    parser.add_argument("--megabytes", type=float, default=1000.0, help="limit of its memory")
    given = parser.parse_args(arguments)
    total = sum(SHARES.values())
    counts = {given.only: given.n} if given.only else {
        name: -(-given.n * share // total) for name, share in SHARES.items()
    }  # fmt: skip
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    found = 0
    fuzzer = Fuzzer(seconds=given.seconds, megabytes=given.megabytes)
    for name, count in counts.items():
        began = time.monotonic()
        tally = Tally(given.out)
        fuzzer.run(name, first=given.first, count=count, tell=tally)
        found += tally.outcomes["finding"]
        print(f"{name}: {tally}, {time.monotonic() - began:.0f} s in all", flush=True)
    fuzzer.close()
    if found:
        print(f"{found} findings; repeat one with --only TARGET --first SEED -n 1")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
