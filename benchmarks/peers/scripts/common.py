"""What every peer's script shares: its options, the network, the clock and the report.

A script reads ``--slide`` (TIFF) and ``--weights`` (from ``prepare.py``), writes the classes as
a Zarr array or ``.npy`` at ``--out`` and prints a line of JSON at its end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plain_unet import load
from torch import Tensor, nn
from torch.nn import functional

MARGIN_PX = 92
CHUNK_PX = 1024


@dataclass(frozen=True, slots=True)
class Job:
    """The options, and the network they ask for."""

    slide: Path
    out: Path
    tile_px: int
    stride_px: int
    net: Network
    tuned: bool
    started_s: float

    def report(
        self, *packages: str, mask: Path | None = None, array: str = "", **facts: Any
    ) -> None:
        """Print what the runner wants to know; the mask is closed by now."""
        work_s = time.perf_counter() - self.started_s
        versions = {name: _version(name) for name in ("torch", "numpy", "tifffile", *packages)}
        found = {"work_s": work_s, "mask": str(mask or self.out), "array": array}
        print(json.dumps({**found, "versions": versions, **facts}), flush=True)


class Network(nn.Module):
    """Pixels 0..255 (B, C, Y, X) of any dtype -> logits of the tile's middle, float32."""

    def __init__(self, weights: Path, dtype: torch.dtype, *, channels_last: bool) -> None:
        super().__init__()
        net, mean, std = load(weights)
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(dtype=dtype, memory_format=self.layout)
        self.dtype = dtype

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K, Y - 184, X - 184)."""
        x = pixels.float() / 255
        if self.mean.numel():
            x = (x - self.mean) / self.std
        x = x.to(self.dtype).contiguous(memory_format=self.layout)
        logits: Tensor = self.net(x).float()
        return logits

    def same(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K, Y, X), zero in the margin: for libraries that want equal sizes."""
        return functional.pad(self(pixels), (MARGIN_PX,) * 4)


def start() -> Job:
    """Read the options and load the network; the clock starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tile", type=int, default=572, help="input side, px")
    parser.add_argument("--stride", type=int, default=388, help="px")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--warm", action="store_true", help="keep freed memory")
    asked = parser.parse_args()
    if asked.warm:
        keep_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[asked.precision]
    net = Network(asked.weights, dtype, channels_last=asked.channels_last).eval()
    return Job(
        asked.slide, asked.out, asked.tile, asked.stride, net, asked.warm, time.perf_counter()
    )


def keep_memory() -> None:
    """Let glibc's malloc keep what was freed: M_MMAP_MAX 0, a high M_TRIM_THRESHOLD."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)
    mallopt(-1, 1 << 30)
    mallopt(-2, 16 << 20)


def class_ids(logits: NDArray[Any], axis: int = 0) -> NDArray[np.uint8]:
    """Classes of logits; one output is a sigmoid."""
    if logits.shape[axis] == 1:
        return (np.take(logits, 0, axis) > 0).astype(np.uint8)
    return logits.argmax(axis).astype(np.uint8)


def tensor_ids(logits: Tensor) -> NDArray[np.uint8]:
    """Classes (Y, X) of logits (1, K, Y, X)."""
    ids = logits[0, 0] > 0 if logits.shape[1] == 1 else logits[0].argmax(0)
    return ids.to(torch.uint8).numpy()


def margins(shape: tuple[int, ...], job: Job) -> list[tuple[int, int]]:
    """Return the px before and after (y, x) by which an image is continued.

    As its users run it: what the network takes off. Tuned: so far at the end that whole strides
    cover it, or the last tile would be moved and its poolings with it.
    """
    more = [(job.stride_px - side) % job.stride_px if job.tuned else 0 for side in shape[:2]]
    spare = job.tile_px - job.stride_px - 2 * MARGIN_PX if job.tuned else 0
    return [(MARGIN_PX, MARGIN_PX + rest + spare) for rest in more]


def mirrored(image: NDArray[Any], job: Job) -> NDArray[Any]:
    """Continue an image (y, x, c) by reflection."""
    return np.pad(image, (*margins(image.shape, job), (0, 0)), mode="reflect")


def to_tensor(tile: NDArray[Any]) -> Tensor:
    """(y, x, c) -> (1, c, y, x)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(tile, -1, 0)))[None]


def write_mask(mask: NDArray[np.uint8], out: Path) -> None:
    """Write a mask that lies in memory as a Zarr array."""
    import zarr

    chunks = (min(CHUNK_PX, mask.shape[0]), min(CHUNK_PX, mask.shape[1]))
    array = zarr.create_array(str(out), shape=mask.shape, chunks=chunks, dtype="uint8")
    array[:] = mask


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
