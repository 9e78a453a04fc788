"""A process that runs executions named on its stdin and says on stdout how each one ended.

Before an execution it writes ``> target seed``, so that its parent knows which one it died or hung
in, and after it a JSON line. Peak memory is VmHWM, which writing 5 to clear_refs sets back:
the peak that ru_maxrss tells is inherited from the parent.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

STATUS = Path("/proc/self/status")


def memory_kb(*keys):
    """Figures of this process' status, kB."""
    text = STATUS.read_text()
    return [int(text.split(name, 1)[1].split(None, 1)[0]) for name in keys]


def execute(target, name, seed, limit_mb):
    """One execution: its outcome, and the finding if there is one."""
    from tests.fuzz.targets import Finding, generator_of
    from tilepipe.errors import TilepipeError

    before, peak = memory_kb("VmRSS:", "VmHWM:")
    if peak - before > limit_mb * 256:
        # An earlier one went far up: the peak is set back, to see how far this one goes.
        Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    outcome, detail = "", ""
    try:
        outcome = target.run(generator_of(name, seed))
    except TilepipeError as error:
        outcome = "refused"
        if not str(error).strip() or len(str(error)) > 4000:
            outcome, detail = "finding", f"a message of {len(str(error))} characters"
    except Finding as error:
        outcome, detail = "finding", str(error)
    except BaseException as error:
        outcome = "finding"
        place = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in place if "tilepipe" in frame.filename]
        where = ours[-1] if ours else place[-1]
        detail = (
            f"{type(error).__name__}: {str(error)[:300]} "
            f"at {Path(where.filename).name}:{where.lineno}"
        )
    # At most a quarter of the limit of this may be an earlier one's.
    grown_mb = max(0, memory_kb("VmHWM:")[0] - before) / 1024
    if grown_mb > limit_mb and outcome != "finding":
        outcome, detail = "finding", f"memory grew by {grown_mb:.0f} MB"
    return {
        "target": name,
        "seed": seed,
        "outcome": outcome,
        "detail": detail,
        "seconds": round(time.process_time() - started, 3),
        "grown_mb": round(grown_mb, 1),
    }


def main():
    """Take ``target first count`` lines until stdin ends."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    limit_mb = float(os.environ["FUZZ_MB"])
    from tests.fuzz.targets import TARGETS

    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an outcome
    with tempfile.TemporaryDirectory(prefix="tilepipe-fuzz-") as folder:
        made = {}
        for line in sys.stdin:
            name, first, count = line.split()
            if name not in made:
                place = Path(folder) / name
                place.mkdir()
                made[name] = TARGETS[name](place)
                # An allocation far beyond the limit fails at once, instead of the machine.
                room = memory_kb("VmSize:")[0] * 1024 + int(4 * limit_mb * (1 << 20))
                resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
            for seed in range(int(first), int(first) + int(count)):
                said.write(f"> {name} {seed}\n")
                said.write(json.dumps(execute(made[name], name, seed, limit_mb)) + "\n")
            said.write("= done\n")


if __name__ == "__main__":
    main()
