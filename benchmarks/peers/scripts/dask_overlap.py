"""Dask: chunks of the slide, ``map_overlap`` with the network, ``to_zarr``."""

from __future__ import annotations

import os
from typing import Any

import dask
import dask.array as da
import numpy as np
import tifffile
import torch
import zarr
from common import MARGIN_PX, Job, start, tensor_ids, to_tensor
from numpy.typing import NDArray


def chunks_of(length: int, stride: int) -> tuple[int, ...]:
    """Chunks of ``stride``; a rest that is too small for its neighbour's overlap joins the last."""
    chunks = [stride] * (length // stride)
    rest = length % stride
    if rest > MARGIN_PX or not chunks:
        chunks.append(rest)
    elif rest:
        chunks[-1] += rest
    return tuple(chunks)


def segment(block: NDArray[Any], job: Job) -> NDArray[np.uint8]:
    """Classes of a chunk with its overlap, (y, x, c) -> (y - 184, x - 184)."""
    height, width = block.shape[0] - 2 * MARGIN_PX, block.shape[1] - 2 * MARGIN_PX
    # Only the last chunks are not of the tile's size; the network takes 188 + 16 k px.
    more = [-(side - 188) % 16 for side in block.shape[:2]]
    tile = np.pad(block, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge")
    return tensor_ids(job.net(to_tensor(tile)))[:height, :width]


def main() -> None:
    job = start()
    cores = len(os.sched_getaffinity(0))
    if job.tuned:
        torch.set_num_threads(1)  # a chunk on each core instead of all cores on each chunk
        dask.config.set(num_workers=cores)
    stored = zarr.open(tifffile.imread(job.slide, aszarr=True), mode="r")
    height, width = stored.shape[:2]
    chunks = (chunks_of(height, job.stride_px), chunks_of(width, job.stride_px))
    image = da.from_zarr(stored).rechunk((*chunks, -1))
    mask = image.map_overlap(
        segment,
        depth=(MARGIN_PX, MARGIN_PX, 0),
        boundary=("reflect", "reflect", "none"),
        trim=False,
        allow_rechunk=False,
        dtype=np.uint8,
        drop_axis=2,
        chunks=chunks,
        meta=np.empty((0, 0), np.uint8),
        job=job,
    )
    mask.rechunk(job.stride_px).to_zarr(str(job.out))
    job.report("dask", "zarr", "imagecodecs", threads=torch.get_num_threads(), workers=cores)


if __name__ == "__main__":
    main()
