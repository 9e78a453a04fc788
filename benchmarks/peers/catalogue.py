"""The alternatives: what each needs installed, which script runs it, and in which settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from figures import balanced_tiling

READ = ("numpy==2.4.6", "tifffile==2026.3.3", "imagecodecs==2026.3.6", "zarr==3.1.6")
TORCH = "torch==2.13.0"
LARGEST_WHOLE_PX = 2048
"""Side up to which the whole image fits through the network in one piece."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a peer."""

    name: str
    precision: str
    tile_px: int
    """Input side of a tile."""
    stride_px: int
    channels_last: bool = False
    warm: bool = False
    """Keep freed memory in the process."""
    group: str = ""
    """"as run" or "tuned" for the summary; empty: left out of it."""

    def arguments(self) -> list[str]:
        """Return the options of a peer's script."""
        found = ["--precision", self.precision]
        found += ["--tile", str(self.tile_px), "--stride", str(self.stride_px)]
        found += ["--channels-last"] if self.channels_last else []
        return found + (["--warm"] if self.warm else [])


@dataclass(frozen=True, slots=True)
class Peer:
    """One alternative, in an environment of its own."""

    name: str
    title: str
    script: str
    requirements: tuple[str, ...]
    environment: str = ""
    """Folder of the environment; default the name."""


PEERS = (
    Peer("loop", "hand-written tifffile + zarr loop", "hand_loop.py", (TORCH, *READ)),
    Peer("dask", "dask map_overlap", "dask_overlap.py", (TORCH, *READ, "dask[array]==2026.8.0")),
    Peer("monai", "MONAI sliding window", "monai_window.py", (TORCH, *READ, "monai==1.6.1")),
    Peer(
        "toolbelt",
        "pytorch-toolbelt slicer + merger",
        "toolbelt_merger.py",
        (TORCH, *READ, "torchvision==0.28.0", "pytorch-toolbelt==0.8.0"),
    ),
    Peer("tiler", "tiler + merger", "tiler_merger.py", (TORCH, *READ, "tiler==0.6.0")),
    # It refuses torch 2.13 and the newest readers: pip chooses those that it allows.
    Peer(
        "tiatoolbox",
        "TIAToolbox SemanticSegmentor",
        "tiatoolbox_segmentor.py",
        ("torch==2.12.1", "torchvision==0.27.1", "tiatoolbox==2.1.3"),
    ),
)


def settings_of(peer: Peer, shape: tuple[int, int], *, largest_px: int) -> Iterator[Setting]:
    """Yield the settings of ``peer`` for a slide of ``shape`` (y, x) px.

    ``largest_px`` bounds the input side of the tuned tiles.
    """
    yield Setting("as its users run it", "fp32", 572, 388, group="as run")
    if peer.name == "loop":
        yield Setting("stride 384", "fp32", 572, 384)
    tile_px, stride_px = balanced_tiling(shape, largest_px)
    yield Setting("tuned", "bf16", tile_px, stride_px, channels_last=True, warm=True, group="tuned")
    if peer.name == "loop" and max(shape) <= LARGEST_WHOLE_PX:
        tile_px, stride_px = balanced_tiling((max(shape),) * 2, max(shape) + 256)
        yield Setting("whole image in one piece", "fp32", tile_px, stride_px)
