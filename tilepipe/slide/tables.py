"""Checks of the tables that say where a page's tiles or strips lie, before a pixel is read."""

from __future__ import annotations

import numpy as np

from tilepipe.errors import SlideError
from tilepipe.slide.segments import SEGMENT_LIMIT_BYTES, PagePixels


def check_segments(path: str, pixels: PagePixels) -> None:
    """Check a page's tables before believing its size; SlideError says what does not add up."""
    wanted = pixels.grid[0] * pixels.grid[1] * (pixels.n_samples if pixels.separate else 1)
    kind = "tiles" if pixels.tiled else "strips"
    if len(pixels.offsets) != wanted or len(pixels.counts) != wanted:
        raise SlideError(
            f"{path}: an image of {pixels.shape[0]} x {pixels.shape[1]} px (y, x) needs {wanted} "
            f"{kind}, the file lists {len(pixels.offsets)} offsets and {len(pixels.counts)} sizes; "
            "the header is damaged"
        )
    if not pixels.raw_rows and pixels.segment_bytes > SEGMENT_LIMIT_BYTES:
        raise SlideError(
            f"{path}: {kind} of {pixels.side[0]} x {pixels.side[1]} px (y, x) decode to "
            f"{pixels.segment_bytes / 2**20:.0f} MiB each, more than the limit of "
            f"{SEGMENT_LIMIT_BYTES >> 20} MiB; write the image again in tiles of 256 to 1024 px"
        )
    if not np.any((pixels.offsets > 0) & (pixels.counts > 0)):
        raise SlideError(f"{path}: none of its {wanted} {kind} holds any data")


def first_missing(pixels: PagePixels) -> tuple[int, str] | None:
    """Find the first segment of a page whose bytes are not all in the file: its number and why."""
    present = (pixels.offsets > 0) & (pixels.counts > 0)
    outside = np.flatnonzero(present & (pixels.offsets + pixels.counts > pixels.file_bytes))
    if len(outside):
        first = int(outside[0])
        return first, (
            f"ends at byte {pixels.offsets[first] + pixels.counts[first]} of a file of "
            f"{pixels.file_bytes} bytes: cut off, {len(outside)} of {len(pixels.offsets)} "
            "are missing"
        )
    if pixels.raw_rows:
        needed = pixels.shape[1] * pixels.samples_each * pixels.dtype.itemsize
        rows = pixels.shape[0] - np.arange(len(pixels.offsets)) % pixels.grid[0] * pixels.side[0]
        needed_each = np.minimum(rows, pixels.side[0]) * needed
        short = np.flatnonzero(present & (pixels.counts < needed_each))
        if len(short):
            first = int(short[0])
            return first, (f"has {pixels.counts[first]} bytes, its rows need {needed_each[first]}")
    return None
