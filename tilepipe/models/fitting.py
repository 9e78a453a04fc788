"""What weights do not say of their network: all that changes no shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilepipe.errors import ModelError
from tilepipe.models.checkpoint import wanted_shapes
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.registry import build, option_defaults


def fits(name: str, arguments: Mapping[str, Any], option: str, value: Any) -> bool:
    """Tell whether weights of a network fit the one whose ``option`` is ``value``, too."""
    if option not in option_defaults(name):
        return False
    try:
        return _shapes(name, arguments) == _shapes(name, {**arguments, option: value})
    except ModelError:  # there is no such network
        return False


def assumed_of(
    name: str, arguments: Mapping[str, Any], *, outputs: int, normalisation: Normalisation
) -> list[str]:
    """Say what is taken of a network that its weights do not say: those of another would fit."""
    chosen = {**option_defaults(name), **arguments}
    switches = [
        f"{option} = {str(bool(chosen[option])).lower()}"
        for option, default in option_defaults(name).items()
        if isinstance(default, bool) and fits(name, arguments, option, not chosen[option])
    ]
    norms = ["ReLU behind the norm", "epsilon 1e-5"] if chosen["norm"] == "batch" else ["ReLU"]
    head = "a sigmoid" if outputs == 1 else "a softmax whose first class is the background"
    pixels = ["pixels from 0 to 1 without mean and std"] if normalisation.kind == "unit" else []
    return [*switches, "the order of joined maps", *norms, head, *pixels]


def _shapes(name: str, arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return wanted_shapes(build(name, in_channels=1, classes=2, **arguments))
