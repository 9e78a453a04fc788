"""Ids of label files: integers from 0, the background; anything else is refused by its file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import TrainError
from tilepipe.tiling import Box
from tilepipe.train.images import Raster


def read_labels(raster: Raster, box: Box) -> NDArray[Any]:
    """(y, x) integer labels of a box; TrainError where the file is not a label image."""
    planes = raster.read(box)
    if planes.shape[0] != 1:
        if not (planes == planes[:1]).all():
            raise TrainError(
                f"{raster.path}: labels of {planes.shape[0]} channels that differ; save one "
                "channel of ids, as a grey image"
            )
        planes = planes[:1]
    check_ids_dtype(planes.dtype, source=raster.path)
    return check_ids(planes[0], source=raster.path)


def check_ids_dtype(dtype: np.dtype[Any], *, source: str) -> None:
    """Raise TrainError unless ``dtype`` is one of integers."""
    if dtype.kind not in "ui":
        raise TrainError(
            f"{source}: labels of dtype {dtype}; ids are integers, so round or threshold first"
        )


def check_ids(ids: NDArray[Any], *, source: str) -> NDArray[Any]:
    """Return (y, x) integer ids; TrainError where one is no id: below 0 or above int64."""
    lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
    if lowest < 0 or highest > np.iinfo(np.int64).max:
        raise TrainError(
            f"{source}: holds id {lowest if lowest < 0 else highest}; ids count from 0, "
            "the background, so renumber them first"
        )
    return ids
