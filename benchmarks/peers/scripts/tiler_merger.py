"""The tiler package: ``Tiler`` and ``Merger`` with its window "overlap-tile" of the U-Net paper."""

from __future__ import annotations

import numpy as np
import tifffile
import torch
from common import MARGIN_PX, class_ids, margins, start, to_tensor, write_mask
from tiler import Merger, Tiler


def main() -> None:
    job = start()
    image = tifffile.imread(job.slide)
    side, overlap = job.tile_px, job.tile_px - job.stride_px
    reads = Tiler(image.shape, (side, side, 3), (overlap, overlap, 0), 2, mode="reflect")
    writes = Tiler(image.shape[:2], (side, side), overlap, mode="reflect")
    window: str | np.ndarray = "overlap-tile"
    _, padding = writes.calculate_padding()
    if job.tuned:  # its padding would shift the poolings; its window is for overlap // 2
        padding = margins(image.shape, job)
        window = np.zeros((side, side), np.float32)
        window[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX] = 1
    image = np.pad(image, (*padding, (0, 0)), mode="reflect")
    reads.recalculate(data_shape=image.shape)
    writes.recalculate(data_shape=image.shape[:2])
    outputs = job.net.net.head.out_channels
    merger = Merger(writes, window=window, logits=outputs, save_visits=not job.tuned)
    for number, tile in reads(image):
        merger.add(number, job.net.same(to_tensor(tile))[0].numpy())
    merged = merger.merge(extra_padding=padding, normalize_by_weights=not job.tuned)
    write_mask(class_ids(merged), job.out)
    job.report("tiler", "zarr", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
