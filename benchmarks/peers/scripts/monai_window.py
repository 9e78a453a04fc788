"""MONAI: ``sliding_window_inference`` over the mirrored image."""

from __future__ import annotations

import tifffile
import torch
from common import MARGIN_PX, mirrored, start, tensor_ids, to_tensor, write_mask
from monai.inferers import sliding_window_inference


def main() -> None:
    job = start()
    pixels = tifffile.imread(job.slide)
    height, width = pixels.shape[:2]
    image = to_tensor(mirrored(pixels, job))
    # The sums are kept in the input's dtype; bfloat16 holds 0..255 exactly.
    image = image.to(torch.bfloat16 if job.tuned else torch.float32)
    # Half a pixel less: the stride is rounded down, and must not become one px less.
    overlap = (job.tile_px - job.stride_px - 0.5) / job.tile_px
    with torch.inference_mode():
        logits = sliding_window_inference(
            image,
            roi_size=(job.tile_px, job.tile_px),
            sw_batch_size=1 if job.tuned else 4,
            predictor=lambda x: job.net.same(x).to(x.dtype),
            overlap=overlap,
        )
    inside = logits[:, :, MARGIN_PX : MARGIN_PX + height, MARGIN_PX : MARGIN_PX + width]
    write_mask(tensor_ids(inside), job.out)
    job.report("monai", "zarr", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
