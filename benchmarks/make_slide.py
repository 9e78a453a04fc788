"""Make a tiled BigTIFF of any size with real texture, in bounded memory.

Pieces of real slides (or, where there are none, of the demo's drawn tissue) are mirrored and laid
side by side; a share of the area, in patches, is white glass.

    python benchmarks/make_slide.py big.tif --side 32768 --glass 0.3
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from tilepipe.slide import open_slide
from tilepipe.tiling import Box

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TILEPIPE_DATA", ROOT.parent / "shared" / "data"))
PIECE = 1024
REAL = (
    ("wsi/CMU-1-Small-Region.svs", (1800, 700)),
    ("wsi/HE_example.tif", (300, 200)),
    ("wsi/CropBreastSlide.tiff", (300, 500)),
)
UInt8 = NDArray[np.uint8]


def read_pieces(data: Path = DATA) -> list[UInt8]:
    """Tissue of PIECE x PIECE px, RGB; real where the data lies at hand, else drawn."""
    pieces = []
    for name, (y, x) in REAL:
        if (data / name).is_file():
            slide = open_slide(data / name)
            height, width = slide.levels[0].shape
            y0, x0 = min(y, height - PIECE), min(x, width - PIECE)
            pieces.append(np.moveaxis(slide.read(Box(y0, x0, y0 + PIECE, x0 + PIECE)), 0, -1))
            slide.close()
    return pieces or [drawn_piece()]


def drawn_piece() -> UInt8:
    """The middle of a drawn slide."""
    place = ROOT / "workflows" / "demo" / "compose.py"
    found = importlib.util.spec_from_file_location("compose", place)
    if found is None or found.loader is None:
        raise SystemExit(f"{place}: not there; give --data the folder of real slides")
    module: Any = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look themselves up there
    found.loader.exec_module(module)
    piece: UInt8 = module.Tissue(4096, seed=1).block(1536, 1536, PIECE)
    return piece


@dataclass(frozen=True)
class Mosaic:
    """Which piece lies where: a grid of PIECE px, each mirrored its own way, or glass."""

    pieces: list[UInt8]
    glass: UInt8
    is_glass: NDArray[np.bool_]
    choice: NDArray[np.int64]

    def read(self, y0: int, x0: int, side: int) -> UInt8:
        """Pixels (side, side, 3) from px (y0, x0)."""
        out = np.empty((side, side, 3), np.uint8)
        wanted = Box(y0, x0, y0 + side, x0 + side)
        for box in wanted.reduced(PIECE).split((1, 1)):
            place = box.enlarged(PIECE)
            part = place.intersect(wanted)
            piece = self._piece(box.y0, box.x0)
            out[part.shift(-y0, -x0).slices] = piece[part.shift(-place.y0, -place.x0).slices]
        return out

    def _piece(self, iy: int, ix: int) -> UInt8:
        rows, columns = self.is_glass.shape
        if iy >= rows or ix >= columns or self.is_glass[iy, ix]:
            return self.glass
        choice = int(self.choice[iy, ix])
        piece = self.pieces[choice // 4 % len(self.pieces)]
        return piece[:: -1 if choice & 1 else 1, :: -1 if choice & 2 else 1]


def plan_mosaic(shape: tuple[int, int], glass: float, seed: int, data: Path = DATA) -> Mosaic:
    """Lay out a slide of ``shape`` (y, x) px with this share of glass, in patches."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-shape[0] // PIECE), -(-shape[1] // PIECE)
    field = rng.normal(size=(rows + 4, columns + 4))
    # A moving mean makes patches out of noise.
    patches = sum(field[dy : dy + rows, dx : dx + columns] for dy in range(5) for dx in range(5))
    order = np.argsort(np.argsort(np.asarray(patches).ravel()))
    is_glass = (order < round(glass * order.size)).reshape(rows, columns)
    pixels = np.clip(rng.normal(243, 1.2, (PIECE, PIECE, 3)), 0, 255).astype(np.uint8)
    return Mosaic(read_pieces(data), pixels, is_glass, rng.integers(0, 1 << 20, (rows, columns)))


def iter_tiles(mosaic: Mosaic, shape: tuple[int, int], tile: int) -> Iterator[UInt8]:
    """Tiles in the order in which a TIFF wants them."""
    for y0 in range(0, shape[0], tile):
        for x0 in range(0, shape[1], tile):
            yield mosaic.read(y0, x0, tile)


def make_slide(
    path: Path,
    shape: tuple[int, int],
    *,
    codec: str = "jpeg",
    tile: int = 256,
    glass: float = 0.0,
    seed: int = 0,
    mpp: float = 0.5,
    quality: int = 90,
    data: Path = DATA,
) -> None:
    """Write an RGB BigTIFF of ``shape`` (y, x) px; memory does not grow with it."""
    mosaic = plan_mosaic(shape, glass, seed, data)
    tifffile.imwrite(
        path,
        iter_tiles(mosaic, shape, tile),
        shape=(*shape, 3),
        dtype=np.uint8,
        tile=(tile, tile),
        bigtiff=True,
        photometric="rgb",
        compression="jpeg" if codec == "jpeg" else "adobe_deflate",
        compressionargs={"level": quality} if codec == "jpeg" else {"level": 6},
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a tiled BigTIFF with real texture.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--side", type=int, default=32768, help="px of a square slide")
    parser.add_argument("--height", type=int, help="px, instead of --side")
    parser.add_argument("--width", type=int, help="px, instead of --side")
    parser.add_argument("--glass", type=float, default=0.0, help="share of white glass, 0 to 1")
    parser.add_argument("--codec", choices=["jpeg", "deflate"], default="jpeg")
    parser.add_argument("--quality", type=int, default=90, help="of JPEG")
    parser.add_argument("--tile", type=int, default=256, help="px, a multiple of 16")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm per px, written in the tags")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of real slides")
    arguments = parser.parse_args()
    if not 0 <= arguments.glass <= 1:
        parser.error(f"--glass {arguments.glass}: want a share, 0 to 1")
    shape = (arguments.height or arguments.side, arguments.width or arguments.side)
    make_slide(
        arguments.path,
        shape,
        codec=arguments.codec,
        tile=arguments.tile,
        glass=arguments.glass,
        seed=arguments.seed,
        mpp=arguments.mpp,
        quality=arguments.quality,
        data=arguments.data,
    )
    size = arguments.path.stat().st_size / 2**20
    print(f"{arguments.path}: {shape[0]} x {shape[1]} px, {size:.0f} MiB")


if __name__ == "__main__":
    main()
