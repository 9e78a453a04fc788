"""``add_bias_relu``: bias and ReLU of a map in one pass on a GPU; needs Triton.

cuDNN's convolution, torch's bias and torch's ReLU are three passes over a map of gigabytes. Here
the last two are one. The arithmetic is torch's: the sum in float32, rounded once.
"""

# No postponed annotations: Triton reads those of a kernel's parameters.

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _kernel(map_ptr, bias_ptr, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    # 64 bits: a batch of large tiles has more than 2**31 numbers. But no division of 64 bits for
    # each of them, and by a constant: it would take longer than the memory does.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = first + place < count
    values = tl.load(map_ptr + first + place, mask=inside)
    channel = ((first % CHANNELS).to(tl.int32) + place) % CHANNELS
    bias = tl.load(bias_ptr + channel, mask=inside)
    total = values.to(tl.float32) + bias.to(tl.float32)
    # Not a maximum, which gives 0 for what is no number: an overflow would go unseen.
    tl.store(map_ptr + first + place, tl.where(total < 0, 0.0, total).to(values.dtype), mask=inside)


def add_bias_relu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add ``bias`` (C,) to ``x`` (B, C, Y, X), channels-last, and cut at 0, in place; return it.

    Raises ValueError for a map that lies otherwise.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a map of {tuple(x.shape)} with strides {x.stride()}: not channels-last")
    count = x.numel()
    blocks = (triton.cdiv(count, _BLOCK),)
    # Triton starts on the current device, wherever the map is.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _kernel[blocks](x, bias, count, CHANNELS=x.shape[1], BLOCK=_BLOCK)
    return x
