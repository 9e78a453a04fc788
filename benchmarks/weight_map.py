"""How much faster the exact weight map is than its formula written out.

    python benchmarks/weight_map.py [--side 512] [--cells 100] [--large]

Three times for one label image: ours; the widely copied direct form (a distance transform of the
whole image for each cell, then a sort); and the formula taken literally, every pixel against every
pixel of every cell, timed on some pixels and scaled up.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy import ndimage

from tilepipe.tiling import Box
from tilepipe.train.weight_map import iter_weight_map, weight_map

W0, SIGMA = 10.0, 5.0


def cells_of(side: int, count: int, seed: int = 0) -> np.ndarray:
    """Discs of 8 to 22 px radius (scaled with the image) that may touch."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    low, high = 8 * side // 512, 22 * side // 512
    for number in range(1, count + 1):
        y, x = rng.integers(0, side, 2)
        r = int(rng.integers(max(2, low), max(3, high)))
        y0, y1, x0, x1 = max(0, y - r), min(side, y + r + 1), max(0, x - r), min(side, x + r + 1)
        yy, xx = np.mgrid[y0:y1, x0:x1]
        part = labels[y0:y1, x0:x1]
        part[((yy - y) ** 2 + (xx - x) ** 2 <= r * r) & (part == 0)] = number
    return labels


def direct(labels: np.ndarray) -> np.ndarray:
    ids = [i for i in np.unique(labels) if i]
    distances = np.stack([ndimage.distance_transform_edt(labels != i) for i in ids])
    distances.sort(axis=0)
    w_c = np.ones(labels.shape)
    return w_c + W0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * SIGMA**2))


def literal_s(labels: np.ndarray, n_pixels: int = 60) -> tuple[float, float]:
    """Seconds for the whole image, and the largest difference from ours on the timed pixels."""
    ours = weight_map(labels, class_weights=(1.0, 1.0), w0=W0, sigma=SIGMA)
    cells = [np.argwhere(labels == i) for i in np.unique(labels) if i]
    rng = np.random.default_rng(1)
    places = rng.integers(0, labels.shape[0], (n_pixels, 2))
    worst, started_s = 0.0, time.perf_counter()
    for place in places:
        nearest = sorted(np.sqrt(((cell - place) ** 2).sum(1).min()) for cell in cells)
        value = 1 + W0 * np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * SIGMA**2))
        worst = max(worst, abs(value - ours[tuple(place)]))
    share = n_pixels / labels.size
    return (time.perf_counter() - started_s) / share, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--large", action="store_true", help="also 20,000² px by pieces")
    arguments = parser.parse_args()
    labels = cells_of(arguments.side, arguments.cells)
    n_cells = len(np.unique(labels)) - 1
    times = []
    for _ in range(3):
        started_s = time.perf_counter()
        ours = weight_map(labels, class_weights=(1.0, 1.0), w0=W0, sigma=SIGMA)
        times.append(time.perf_counter() - started_s)
    ours_s = min(times)
    started_s = time.perf_counter()
    other = direct(labels)
    direct_s = time.perf_counter() - started_s
    literal, worst = literal_s(labels)
    print(f"{arguments.side}² px, {n_cells} cells")
    print(f"ours                          {ours_s:9.3f} s")
    print(f"a transform per cell, sorted  {direct_s:9.3f} s  {direct_s / ours_s:8.1f} x")
    print(f"the formula taken literally   {literal:9.1f} s  {literal / ours_s:8.0f} x (scaled up)")
    print(f"largest difference            {max(worst, float(np.abs(other - ours).max())):9.1e}")
    if arguments.large:
        tile = cells_of(1000, 380)
        extent = (20_000, 20_000)

        def read(box: Box) -> np.ndarray:
            rows = np.arange(box.y0, box.y1)
            columns = np.arange(box.x0, box.x1)
            ids = tile[rows[:, None] % 1000, columns[None] % 1000].astype(np.int64)
            place = (rows[:, None] // 1000) * 20 + columns[None] // 1000
            return np.where(ids > 0, ids + 1000 * place, 0)

        started_s = time.perf_counter()
        total = sum(
            float(values.sum())
            for _, values in iter_weight_map(read, extent, class_weights=(1.0, 1.0))
        )
        spent_s = time.perf_counter() - started_s
        print(f"20,000² px, 152,000 cells     {spent_s:9.1f} s  (mean {total / 4e8:.3f})")


if __name__ == "__main__":
    main()
