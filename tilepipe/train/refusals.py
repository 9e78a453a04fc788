"""What torch refuses of a batch, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tilepipe.errors import TrainError
from tilepipe.infer.backends import means_out_of_memory


@contextmanager
def told(batch: int, input_px: int) -> Iterator[None]:
    """Turn what torch says of a batch of ``batch`` samples into a TrainError that says what next.

    A BatchNorm has no statistics of one number: where the deepest map of the only sample is 1 px.
    """
    samples = f"{batch} samples of {input_px} px a side"
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if means_out_of_memory(error):
            raise TrainError(
                f"out of memory in a step of {samples}: try a smaller --batch or --output-px"
            ) from error
        if "more than 1 value per channel" in str(error):
            raise TrainError(
                f"BatchNorm sees a single px in {samples}, of which there is no variance: try a "
                "larger --batch or --output-px"
            ) from error
        raise
