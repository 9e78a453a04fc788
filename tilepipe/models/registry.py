"""The nine architectures: names, papers, and how one is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from tilepipe.errors import ModelError
from tilepipe.models.net import Net
from tilepipe.models.u2net import U2Net
from tilepipe.models.unet import UNet
from tilepipe.models.unet3plus import UNet3Plus
from tilepipe.models.unet_bilinear import UNetBilinear
from tilepipe.models.unet_dilated import UNetDilated
from tilepipe.models.unet_same import UNetSame
from tilepipe.models.unetpp import UNetPlusPlus


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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that make this name what it is."""
    default_base: int = 64
    probe_base: int = 2
    """Channels of the thin form that the locality probe runs."""


_PLAIN = "tiles with the full context on the alignment equal the whole image"

ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture(
            name="unet",
            net=UNet,
            paper="Ronneberger, Fischer, Brox 2015, arXiv:1505.04597",
            paper_parameters="31.03 M (counted from fig. 1)",
            exactness=_PLAIN,
        ),
        Architecture(
            name="unet-same",
            net=UNetSame,
            paper="Ronneberger, Fischer, Brox 2015, padded, with BatchNorm (Ioffe, Szegedy 2015)",
            paper_parameters="not given",
            exactness=_PLAIN,
        ),
        Architecture(
            name="unet-bilinear",
            net=UNetBilinear,
            paper="Ronneberger, Fischer, Brox 2015, bilinear upsampling behind a 1x1",
            paper_parameters="not given",
            exactness=f"{_PLAIN}; never with align_corners=true",
        ),
        Architecture(
            name="unet-dilated",
            net=UNetDilated,
            paper="Ronneberger et al. 2015, dilation as in Yu, Koltun 2016, arXiv:1511.07122",
            paper_parameters="not given",
            exactness="never: skips and output are resized by a factor that depends on the tile",
        ),
        Architecture(
            name="unetpp",
            net=UNetPlusPlus,
            paper="Zhou, Siddiquee, Tajbakhsh, Liang 2018, arXiv:1807.10165",
            paper_parameters="9.04 M",
            exactness=_PLAIN,
            default_base=32,
        ),
        Architecture(
            name="u2net",
            net=U2Net,
            paper="Qin et al. 2020, arXiv:2005.09007",
            paper_parameters="44.0 M (176.3 MB)",
            exactness=f"{_PLAIN}, but the context is very wide: blended unless --exact",
            fixed={"small": False},
        ),
        Architecture(
            name="u2netp",
            net=U2Net,
            paper="Qin et al. 2020, arXiv:2005.09007",
            paper_parameters="1.13 M (4.7 MB)",
            exactness=f"{_PLAIN}, but the context is very wide: blended unless --exact",
            fixed={"small": True},
        ),
        Architecture(
            name="unet3plus",
            net=UNet3Plus,
            paper="Huang et al. 2020, arXiv:2004.08790",
            paper_parameters="26.97 M",
            exactness=_PLAIN,
            fixed={"cgm": False},
        ),
        Architecture(
            name="unet3plus-cgm",
            net=UNet3Plus,
            paper="Huang et al. 2020, arXiv:2004.08790",
            paper_parameters="26.97 M (without the gate)",
            exactness="in two passes: masks and the gate's global maximum, then the gate",
            fixed={"cgm": True},
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


def option_defaults(name: str) -> dict[str, Any]:
    """Defaults of the options that ``build(name, ...)`` takes beyond channels, classes and base."""
    entry = architecture(name)
    parameters = inspect.signature(entry.net).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in entry.fixed
    }


def option_names(name: str) -> tuple[str, ...]:
    """Names of the options that ``build(name, ...)`` takes."""
    return tuple(option_defaults(name))


def check_arguments(name: str, arguments: Iterable[str]) -> None:
    """Raise ModelError unless each argument is ``base`` or an option of ``name``."""
    known = option_names(name)
    for argument in arguments:
        if argument != "base" and argument not in known:
            raise ModelError(
                f"{name} has no option {argument!r}; it takes {', '.join(known) or 'none'}"
            )


def _check_values(name: str, options: Mapping[str, Any]) -> None:
    """Raise ModelError for what Python would take for a switch or number that was not meant.

    Any word would turn a switch on; of NaN torch finds neither that it is too small nor too large.
    """
    defaults = option_defaults(name)
    for option, value in options.items():
        default = defaults[option]
        if isinstance(default, bool):
            if not isinstance(value, bool | int) or value not in (0, 1):
                raise ModelError(f"{name}: {option} {value!r}; the choices are true and false")
        elif isinstance(default, int | float) and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ModelError(f"{name}: {option} {value!r}; a number is wanted, such as {default}")


def check_build(name: str, *, in_channels: int, classes: int, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError unless ``build`` would make this network; nothing is allocated."""
    check_arguments(name, arguments)
    with torch.device("meta"):
        build(name, in_channels=in_channels, classes=classes, **arguments)


def build(
    name: str, *, in_channels: int, classes: int, base: int | None = None, **options: Any
) -> Net:
    """Return the training form of an architecture with fresh He-normal weights.

    ``classes`` is the number of logits: 1 (sigmoid) or the number of mask classes (softmax).
    ``base`` is the width of the first level, default the paper's. ModelError lists the options.
    """
    entry = architecture(name)
    check_arguments(name, options)
    _check_values(name, options)
    try:
        return entry.net(
            in_channels,
            classes,
            entry.default_base if base is None else base,
            **entry.fixed,
            **options,
        )
    except ModelError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{name} cannot be built with {options}: {error}") from error


def count_parameters(net: torch.nn.Module) -> int:
    """Return the number of learned numbers."""
    return sum(parameter.numel() for parameter in net.parameters())


@cache
def parameters_of(name: str, in_channels: int = 3, classes: int = 2) -> int:
    """Return the parameters of the training form at full width, without making it."""
    with torch.device("meta"):
        return count_parameters(build(name, in_channels=in_channels, classes=classes))
