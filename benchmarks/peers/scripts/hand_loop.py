"""The loop that people write by hand: a window, the network, arg-max, into the mask."""

from __future__ import annotations

import numpy as np
import tifffile
import torch
import zarr
from common import MARGIN_PX, start, tensor_ids, to_tensor


def main() -> None:
    job = start()
    image = zarr.open(tifffile.imread(job.slide, aszarr=True), mode="r")
    height, width = image.shape[:2]
    stride = job.stride_px
    chunks = (min(stride, height), min(stride, width))
    mask = zarr.create_array(str(job.out), shape=(height, width), chunks=chunks, dtype="uint8")
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            top, left = y - MARGIN_PX, x - MARGIN_PX
            bottom, right = top + job.tile_px, left + job.tile_px
            tile = image[max(0, top) : min(bottom, height), max(0, left) : min(right, width)]
            beyond = (
                (max(0, -top), max(0, bottom - height)),
                (max(0, -left), max(0, right - width)),
                (0, 0),
            )
            tile = np.pad(tile, beyond, mode="reflect")
            y1, x1 = min(y + stride, height), min(x + stride, width)
            mask[y:y1, x:x1] = tensor_ids(job.net(to_tensor(tile)))[: y1 - y, : x1 - x]
    job.report("zarr", "imagecodecs", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
