"""Names what in a network makes tiles depend on each other, by watching one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_GLOBAL = {
    "_adaptive_avg_pool2d": "global pooling",
    "adaptive_avg_pool2d": "global pooling",
    "adaptive_max_pool2d": "global pooling",
    "native_group_norm": "group norm",
    "native_layer_norm": "layer norm",
    "instance_norm": "instance norm",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_attention_math": "attention",
    "_softmax": "attention",
    "bmm": "attention",
}
_REDUCTIONS = ("mean", "amax", "sum", "max", "var", "std", "var_mean")
_BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
_UPSAMPLES = ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa")


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the causes that the operations of a forward pass give away."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.global_causes: list[str] = []
        self.never_causes: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        name = str(func).removeprefix("aten.").partition(".")[0]
        given = _named(func, args, kwargs)
        if name in _GLOBAL and _is_spatial(args):
            _add(self.global_causes, _GLOBAL[name])
        elif name in _BATCH_NORMS or name.startswith("_native_batch_norm"):
            if given.get("training", given.get("running_mean") is None):
                _add(self.global_causes, "instance norm (or BatchNorm on the tile's statistics)")
        elif name in _REDUCTIONS and _reduces_space(args, out):
            _add(self.global_causes, "global pooling")
        elif name in _UPSAMPLES:
            source, size = args[0].shape[-2:], out.shape[-2:]
            if given.get("align_corners"):
                _add(self.never_causes, "bilinear resize with align_corners=True")
            elif any(b % a for a, b in zip(source, size, strict=True)):
                _add(self.never_causes, "resize by a factor that is not whole")
        return out


def watch(forward: Callable[[Tensor], Any], x: Tensor) -> tuple[list[str], list[str]]:
    """Run ``forward(x)``; return what makes it global and what makes it position dependent."""
    with _Watcher() as watcher, torch.no_grad():
        forward(x)
    return watcher.global_causes, watcher.never_causes


def named_in(module: nn.Module) -> list[str]:
    """Causes that the module's own parts name, for networks that cannot be watched."""
    kinds = (
        ("InstanceNorm", "instance norm"),
        ("GroupNorm", "group norm"),
        ("LayerNorm", "layer norm"),
        ("AdaptiveAvgPool", "global pooling"),
        ("AdaptiveMaxPool", "global pooling"),
        ("MultiheadAttention", "attention"),
    )
    found: list[str] = []
    for part in module.modules():
        name = str(getattr(part, "original_name", type(part).__name__))
        for kind, cause in kinds:
            if name.startswith(kind):
                _add(found, cause)
    return found


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_spatial(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dim() >= 3


def _reduces_space(args: tuple[Any, ...], out: Any) -> bool:
    if not _is_spatial(args):
        return False
    first = out[0] if isinstance(out, tuple) else out
    return (
        isinstance(first, Tensor)
        and first.numel() * 16 <= args[0].numel()
        and (first.dim() < 4 or first.shape[-1] == 1 or first.shape[-2] == 1)
    )


def _add(causes: list[str], cause: str) -> None:
    if cause not in causes:
        causes.append(cause)
