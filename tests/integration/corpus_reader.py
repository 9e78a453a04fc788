"""Read every slide named on stdin and say in JSON lines what became of it (run by test_corpus).

A process of its own, so that its peak memory can be measured and a hang can be killed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tilepipe.errors import SlideError
from tilepipe.slide import open_slide
from tilepipe.tiling import Box


def peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def outcome(path: str) -> dict[str, str]:
    try:
        with open_slide(path) as slide:
            for number, level in enumerate(slide.levels):
                boxes = list(Box.of_shape(level.shape).split((1024, 1024)))
                # Of the few that are large every seventh box is enough here.
                for box in boxes[:: 7 if len(boxes) > 25 else 1]:
                    slide.read(box, level=number)
    except SlideError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:  # what must not happen is reported, not raised
        return {"error": f"!{type(error).__name__}", "message": str(error)}
    return {"error": "", "message": ""}


for line in sys.stdin:
    path = line.rstrip("\n")
    # Writing 5 resets the peak of this process.
    Path("/proc/self/clear_refs").write_text("5")
    started = time.monotonic()
    said = outcome(path)
    seconds = time.monotonic() - started
    sys.stdout.write(
        json.dumps({"path": path, **said, "peak_kb": peak_kb(), "seconds": seconds}) + "\n"
    )
