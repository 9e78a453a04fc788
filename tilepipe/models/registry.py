"""The nine architectures: names, papers, and how one is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tilepipe.errors import ModelError
from tilepipe.models.net import Net
from tilepipe.models.unet import UNet


@dataclass(frozen=True, slots=True)
class Architecture:
    """One registered network."""

    name: str
    net: Callable[..., Net]
    paper: str
    paper_parameters: str
    """The paper's own number, or what is said about it."""
    exactness: str
    """How a tiled mask becomes exact, or why it cannot, in one line."""
    fixed: Mapping[str, Any]
    """Arguments that make this name what it is."""
    default_base: int = 64
    probe_base: int = 4
    """Channels of the thin form that the locality probe runs."""


ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            "unet",
            UNet,
            "Ronneberger, Fischer, Brox 2015, arXiv:1505.04597",
            "31.03 M",
            "local: tiles with the full context are exact",
            {},
        ),
    )
}


def architecture(name: str) -> Architecture:
    """Return the entry called ``name``; ModelError lists the names there are."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ModelError(
            f"no architecture is called {name!r}; there are {', '.join(ARCHITECTURES)}"
        ) from None


def option_names(name: str) -> tuple[str, ...]:
    """Names of the options that ``build(name, ...)`` takes beyond channels, classes and base."""
    entry = architecture(name)
    parameters = inspect.signature(entry.net).parameters.values()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in entry.fixed
    )


def build(
    name: str, *, in_channels: int, classes: int, base: int | None = None, **options: Any
) -> Net:
    """Return the training form of an architecture with fresh He-normal weights.

    ``classes`` is the number of logits: 1 (sigmoid) or the number of mask classes (softmax).
    ``base`` is the width of the first level, default the paper's. ModelError lists the options.
    """
    entry = architecture(name)
    known = option_names(name)
    for option in options:
        if option not in known:
            raise ModelError(
                f"{name} has no option {option!r}; it takes {', '.join(known) or 'none'}"
            )
    try:
        return entry.net(
            in_channels,
            classes,
            entry.default_base if base is None else base,
            **entry.fixed,
            **options,
        )
    except (TypeError, AttributeError) as error:
        raise ModelError(f"{name} cannot be built with {options}: {error}") from error


def count_parameters(net: torch.nn.Module) -> int:
    """Return the number of learned numbers."""
    return sum(parameter.numel() for parameter in net.parameters())


@cache
def parameters_of(name: str, in_channels: int = 3, classes: int = 2) -> int:
    """Return the parameters of the training form at full width, without making it."""
    with torch.device("meta"):
        return count_parameters(build(name, in_channels=in_channels, classes=classes))
