"""TIAToolbox: ``SemanticSegmentor`` with a network of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import class_ids, start
from numpy.typing import NDArray
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC
from torch import Tensor, nn


class Wrapped(ModelABC):  # type: ignore[misc]
    """Our network as TIAToolbox wants it: NHWC pixels in, NHWC scores out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits."""
        logits: Tensor = self.net(x)
        return logits

    @staticmethod
    def infer_batch(model: nn.Module, batch_data: Tensor, *, device: str) -> NDArray[Any]:
        """Return logits (B, Y - 184, X - 184, K)."""
        pixels = torch.as_tensor(batch_data).to(device).permute(0, 3, 1, 2)
        return np.ascontiguousarray(model(pixels).permute(0, 2, 3, 1).numpy())

    @staticmethod
    def postproc(image: Any) -> Any:
        """Return the classes."""
        return class_ids(image, axis=-1)


def main() -> None:
    job = start()
    engine = SemanticSegmentor(
        model=Wrapped(job.net), batch_size=1 if job.tuned else 4, verbose=False
    )
    here = [{"units": "baseline", "resolution": 1.0}]
    side = job.tile_px - 184
    config = IOSegmentorConfig(
        input_resolutions=here,
        output_resolutions=here,
        patch_input_shape=(job.tile_px, job.tile_px),
        patch_output_shape=(side, side),
        stride_shape=(job.stride_px, job.stride_px),
        save_resolution=here[0],
    )
    found = engine.run(
        images=[job.slide],
        patch_mode=False,
        ioconfig=config,
        save_dir=job.out,
        output_type="zarr",
        auto_get_mask=False,
        device="cpu",
    )
    (mask,) = found.values()
    job.report(
        "tiatoolbox", "zarr", mask=mask, array="predictions", threads=torch.get_num_threads()
    )


if __name__ == "__main__":
    main()
