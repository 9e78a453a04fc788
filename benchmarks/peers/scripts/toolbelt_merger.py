"""pytorch-toolbelt: ``ImageSlicer`` and ``TileMerger``, as its README shows them."""

from __future__ import annotations

import sys
from types import ModuleType

import cv2
import numpy as np
import tifffile
import torch
from common import MARGIN_PX, mirrored, start, tensor_ids, write_mask
from torch.utils.data import DataLoader

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A torch without CUDA beside a torchvision with it. The merger needs nothing of it, but the
    # package imports one name.
    found = ModuleType("torchvision.ops")
    found.__dict__["box_iou"] = None
    sys.modules["torchvision"] = ModuleType("torchvision")
    sys.modules["torchvision.ops"] = found
from pytorch_toolbelt.inference.tiles import ImageSlicer, TileMerger


def main() -> None:
    job = start()
    pixels = tifffile.imread(job.slide)
    height, width = pixels.shape[:2]
    image = mirrored(pixels, job)
    slicer = ImageSlicer(image.shape, tile_size=job.tile_px, tile_step=job.stride_px)
    tiles = [
        np.moveaxis(tile, -1, 0) for tile in slicer.split(image, border_type=cv2.BORDER_REFLECT_101)
    ]
    outputs = job.net.net.head.out_channels
    merger = TileMerger(slicer.target_shape, outputs, slicer.weight)
    pairs = list(zip(tiles, slicer.crops, strict=True))
    for batch, places in DataLoader(pairs, batch_size=1 if job.tuned else 4):
        merger.integrate_batch(job.net.same(batch), places)
    merged = merger.merge_() if job.tuned else merger.merge()
    top, left = slicer.margin_top + MARGIN_PX, slicer.margin_left + MARGIN_PX
    ids = tensor_ids(merged[None, :, top : top + height, left : left + width])
    write_mask(ids, job.out)
    job.report("pytorch-toolbelt", "opencv-python", "zarr", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
