"""``make demo``: draw a slide, segment it with the bundled weights, leave pictures to look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "demo"


def step(*command: str) -> None:
    """Run one command, shown as the user would type it."""
    print("$ " + " ".join(Path(part).name if "/bin/" in part else part for part in command))
    subprocess.run(command, check=True)


def main() -> None:
    """Run the demo; everything lands in ``demo/``."""
    DEMO.mkdir(exist_ok=True)
    slide, store = DEMO / "slide.tif", DEMO / "slide.zarr"
    tilepipe = str(Path(sys.executable).with_name("tilepipe"))
    if not slide.exists():
        step(sys.executable, str(HERE / "compose.py"), str(slide), "--side", "4096")
    step(tilepipe, "run", str(slide), "-o", str(store), "--job", str(HERE / "job.toml"))
    step(tilepipe, "verify", str(store), "--samples", "4")
    step(tilepipe, "export", str(store), "--to", "png", "-o", str(DEMO / "overview.png"))
    step(tilepipe, "export", str(store), "--to", "png", "--region", "1500,1500,2200,2200",
         "-o", str(DEMO / "overlay.png"))  # fmt: skip
    print(f"\nLook at {DEMO / 'overview.png'} and {DEMO / 'overlay.png'}, or type\n"
          f"  {tilepipe} view {store}")  # fmt: skip


if __name__ == "__main__":
    main()
