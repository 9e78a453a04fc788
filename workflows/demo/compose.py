"""Make a slide that looks like stained tissue: nuclei, stroma, fibres and glass, from a seed.

It needs no data of anybody's. The stains are mixed as optical densities (haematoxylin and eosin
absorb light, they do not paint), nuclei are soft ellipses with grainy chromatin, and some of them
stand in rings like glands. Pixels are made block by block: memory does not grow with the side.

    python compose.py slide.tif --side 4096
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

Float = NDArray[np.float32]

MPP = 0.5
TILE = 256
# Absorbance of red, green and blue per unit of stain (after Ruifrok and Johnston 2001).
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.09, 0.87, 0.34], np.float32)
GLASS = np.array([244.0, 243.0, 245.0], np.float32)


@dataclass(frozen=True)
class Nuclei:
    """Ellipses, one per entry; px and radians."""

    y: Float
    x: Float
    long: Float
    short: Float
    angle: Float
    stain: Float

    def near(self, y0: int, x0: int, side: int, margin: int = 24) -> NDArray[np.intp]:
        """Numbers of the nuclei that can touch a block."""
        inside = (self.y > y0 - margin) & (self.y < y0 + side + margin)
        inside &= (self.x > x0 - margin) & (self.x < x0 + side + margin)
        return np.flatnonzero(inside)


class Tissue:
    """Everything about the slide that is decided before the first pixel."""

    def __init__(self, side_px: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.side = side_px
        self.seed = seed
        self.outline = rng.normal(size=(7, 7)).astype(np.float32)
        self.density = rng.normal(size=(24, 24)).astype(np.float32)
        self.fibres = rng.normal(size=(512, 512)).astype(np.float32)
        self.grain = rng.normal(size=(512, 512)).astype(np.float32)
        self.nuclei = self._place(rng)

    def amount(self, y: Float, x: Float) -> Float:
        """How much tissue lies at px (y, x): below 0 is glass."""
        u, v = y / self.side * 2 - 1, x / self.side * 2 - 1
        return 0.78 - np.hypot(u, v) + 0.22 * _smooth(self.outline, (u + 1) / 2, (v + 1) / 2)

    def _place(self, rng: np.random.Generator) -> Nuclei:
        """Scatter nuclei in the tissue, some in rings; crowded where ``density`` is high."""
        step = 21
        cells = np.arange(step / 2, self.side, step, dtype=np.float32)
        y, x = (axis.ravel() for axis in np.meshgrid(cells, cells, indexing="ij"))
        y = y + rng.uniform(-7, 7, y.shape).astype(np.float32)
        x = x + rng.uniform(-7, 7, x.shape).astype(np.float32)
        crowd = _smooth(self.density, y / self.side, x / self.side)
        kept = rng.uniform(size=y.shape) < 0.45 + 0.3 * crowd
        y, x = y[kept], x[kept]
        angle = rng.uniform(0, np.pi, y.shape).astype(np.float32)
        n_glands = max(1, (self.side // 400) ** 2 // 2)
        for cy, cx in rng.uniform(0, self.side, (n_glands, 2)):
            radius = rng.uniform(45, 95)
            clear = np.hypot(y - cy, x - cx) > radius + 14
            turns = np.arange(0, 2 * np.pi, 15 / radius)
            y = np.concatenate([y[clear], cy + radius * np.sin(turns)]).astype(np.float32)
            x = np.concatenate([x[clear], cx + radius * np.cos(turns)]).astype(np.float32)
            # The long axis points at the gland's middle.
            angle = np.concatenate([angle[clear], turns]).astype(np.float32)
        inside = self.amount(y, x) > 0.03
        y, x, angle = y[inside], x[inside], angle[inside]
        long = rng.uniform(6.0, 10.0, y.shape).astype(np.float32)
        short = (long * rng.uniform(0.55, 0.95, y.shape)).astype(np.float32)
        stain = rng.uniform(0.38, 0.8, y.shape).astype(np.float32)
        return Nuclei(y, x, long, short, angle, stain)

    def block(self, y0: int, x0: int, side: int) -> NDArray[np.uint8]:
        """RGB pixels (side, side, 3) of the block whose corner is px (y0, x0)."""
        y = np.arange(y0, y0 + side, dtype=np.float32)[:, None]
        x = np.arange(x0, x0 + side, dtype=np.float32)[None, :]
        edge = np.clip(self.amount(*np.broadcast_arrays(y, x)) * 25, 0, 1)
        fibres = _lookup(self.fibres, y * 0.9 + x * 0.35, x * 0.12 - y * 0.05)
        grain = _lookup(self.grain, y * 0.45, x * 0.45)
        eosin = edge * np.clip(0.24 + 0.07 * fibres + 0.03 * grain, 0.02, None)
        blue = edge * np.clip(0.03 + 0.015 * grain, 0, None)
        for number in self.nuclei.near(y0, x0, side):
            self._draw(blue, number, y0, x0)
        light = blue[..., None] * HAEMATOXYLIN + eosin[..., None] * EOSIN
        rgb = GLASS * np.power(np.float32(10), -light)
        noise = np.random.default_rng((self.seed, y0, x0)).normal(0, 1.6, rgb.shape)
        return np.clip(rgb + noise, 0, 255).astype(np.uint8)

    def _draw(self, blue: Float, number: np.intp, y0: int, x0: int) -> None:
        cy, cx = self.nuclei.y[number] - y0, self.nuclei.x[number] - x0
        reach = 14
        top, bottom = max(0, int(cy) - reach), min(blue.shape[0], int(cy) + reach + 1)
        left, right = max(0, int(cx) - reach), min(blue.shape[1], int(cx) + reach + 1)
        if top >= bottom or left >= right:
            return
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] - cy
        dx = np.arange(left, right, dtype=np.float32)[None, :] - cx
        cosine, sine = np.cos(self.nuclei.angle[number]), np.sin(self.nuclei.angle[number])
        along, across = dx * cosine + dy * sine, dy * cosine - dx * sine
        radius = np.hypot(along / self.nuclei.long[number], across / self.nuclei.short[number])
        body = np.clip((1.05 - radius) * 5, 0, 1)
        chromatin = _lookup(self.grain, (dy + cy + y0) * 1.7, (dx + cx + x0) * 1.7)
        stain = self.nuclei.stain[number] * (1 + 0.22 * chromatin + 0.25 * (radius > 0.75))
        part = blue[top:bottom, left:right]
        np.maximum(part, body * stain, out=part)


def _smooth(field: Float, u: Float, v: Float) -> Float:
    """Cubic-eased value of a coarse random field at (u, v) in 0..1."""
    rows, columns = field.shape
    return _lookup(field, np.clip(u, 0, 1) * (rows - 1.001), np.clip(v, 0, 1) * (columns - 1.001))


def _lookup(field: Float, y: Float, x: Float) -> Float:
    """Value of a periodic random field between its samples, eased so that no edges show."""
    rows, columns = field.shape
    floor_y, floor_x = np.floor(y), np.floor(x)
    fy, fx = y - floor_y, x - floor_x
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    iy, ix = floor_y.astype(np.int64) % rows, floor_x.astype(np.int64) % columns
    jy, jx = (iy + 1) % rows, (ix + 1) % columns
    upper = field[iy, ix] * (1 - fx) + field[iy, jx] * fx
    lower = field[jy, ix] * (1 - fx) + field[jy, jx] * fx
    return np.asarray(upper * (1 - fy) + lower * fy, np.float32)


def iter_tiles(tissue: Tissue, rows: int, columns: int) -> Iterator[NDArray[np.uint8]]:
    """Tiles (256, 256, 3) in the order in which a TIFF wants them."""
    for iy in range(rows):
        for ix in range(columns):
            yield tissue.block(iy * TILE, ix * TILE, TILE)


def compose(path: Path, side_px: int = 4096, *, seed: int = 2015) -> int:
    """Write the slide as a JPEG-tiled TIFF with 0.5 µm pixels; return its number of nuclei.

    The same side and seed give the same pixels.
    """
    tissue = Tissue(side_px, seed)
    tiles = -(-side_px // TILE)
    tifffile.imwrite(
        path,
        iter_tiles(tissue, tiles, tiles),
        shape=(side_px, side_px, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 90},
        bigtiff=side_px > 16384,
        resolution=(1e4 / MPP, 1e4 / MPP),
        resolutionunit="CENTIMETER",
        metadata=None,
        software="tilepipe demo",
    )
    return len(tissue.nuclei.y)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=2015)
    arguments = parser.parse_args()
    count = compose(arguments.path, arguments.side, seed=arguments.seed)
    print(f"{arguments.path}: {arguments.side} x {arguments.side} px, {count} nuclei")


if __name__ == "__main__":
    main()
