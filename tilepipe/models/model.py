"""``Model``: a network ready to segment, with everything that is known about it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tilepipe.errors import CheckpointError, ModelError, argument
from tilepipe.models.checkpoint import hash_weights, read_checkpoint, weights_of
from tilepipe.models.fitting import fits
from tilepipe.models.header import Header, normalisation_of
from tilepipe.models.locality import Locality, check_halo, recorded_localities
from tilepipe.models.net import Net
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.registry import (
    ARCHITECTURES,
    architecture,
    build,
    check_arguments,
    option_defaults,
)
from tilepipe.models.seeded import fill_seeded, parse_seed
from tilepipe.spec import JobSpec, LabelClass, at_home, default_classes

WEIGHTS = Path(__file__).with_name("weights")
Activation = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, eq=False)
class Model:
    """Inference form of a network."""

    name: str
    module: nn.Module
    """(B, C, Y, X) float, normalised -> logits (B, K, Y - 2m, X - 2m); eval, no gradients."""
    arguments: Mapping[str, Any]
    """Base and options, as ``build`` takes them."""
    in_channels: int
    n_outputs: int
    """Channels of the logits; 1 means sigmoid."""
    classes: tuple[LabelClass, ...]
    """Classes of the mask: class id = index."""
    normalisation: Normalisation
    mpp: float | None
    """µm per px of the training images, or None."""
    locality: Locality
    sha256: str
    """Of the float32 weights before folding."""
    source: str
    """"bundled", a path, or "random:SEED"."""
    policy: str = "one output"
    """What became of side outputs."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further facts of the checkpoint, such as its training account."""

    @property
    def activation(self) -> Activation:
        """Sigmoid for one output, softmax for more."""
        return "sigmoid" if self.n_outputs == 1 else "softmax"

    @property
    def identity(self) -> str:
        """16 hex digits that change with whatever decides the class ids, or what they are called.

        The weights alone do not: the same ones, converted again, may be shown pixels otherwise.
        """
        facts = [self.sha256, self.name, dict(self.arguments), asdict(self.normalisation),
                 [entry.name for entry in self.classes]]  # fmt: skip
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def luminance(self) -> bool:
        """Tell whether the network, of one channel, has learnt from the luminance of colours."""
        return self.in_channels == 1 and self.extra.get("luminance") is True

    @property
    def has_gate(self) -> bool:
        """Tell whether the module has ``gate_logits`` (UNet 3+ with CGM)."""
        return hasattr(self.module, "gate_logits")

    def normalise(self, x: Tensor) -> Tensor:
        """Pixels uint8, uint16 or float (B, C, Y, X) -> what the module takes, float32."""
        return self.normalisation(x)

    def class_ids(self, logits: Tensor) -> Tensor:
        """Logits (B, K, Y, X) -> uint8 class ids (B, Y, X)."""
        if self.n_outputs == 1:
            return (logits[:, 0] > 0).to(torch.uint8)
        return logits.argmax(dim=1).to(torch.uint8)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (B, K, Y, X) -> probabilities of each class of the mask (B, classes, Y, X)."""
        if self.n_outputs == 1:
            p = torch.sigmoid(logits)
            return torch.cat((1 - p, p), dim=1)
        return torch.softmax(logits, dim=1)

    def next_legal(self, px: int) -> int:
        """Return the smallest legal input side that is at least ``px``."""
        return self.locality.next_legal(px)

    def to_json(self) -> dict[str, Any]:
        """Return what a store records about the model."""
        return {
            "name": self.name,
            "arguments": dict(self.arguments),
            "in_channels": self.in_channels,
            "outputs": self.n_outputs,
            "sha256": self.sha256,
            "source": self.source,
            "policy": self.policy,
        }


def load_model(
    name_or_path: str | Path,
    *,
    weights: str | Path | None = None,
    in_channels: int | None = None,
    classes: int | None = None,
    base: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Load a network by architecture name or by the path of its weights.

    ``weights`` is a file, ``random:SEED``, or None for the bundled weights of that name.
    ``in_channels``, ``classes`` (logits: 1 is a sigmoid), ``base`` and ``options`` build the
    network for ``random:``; for a file they must agree with its header.

    Raises ModelError for an unknown name, CheckpointError for weights that cannot be used.
    """
    name = at_home(str(name_or_path))
    # Numbers of numpy are not the same to JSON, by which stores know a network.
    in_channels, classes, base = _native(in_channels), _native(classes), _native(base)
    options = {key: _native(value) for key, value in (options or {}).items()}
    asked = {"in_channels": in_channels, "outputs": classes, "base": base, **options}
    if name not in ARCHITECTURES:
        if weights is not None:
            architecture(name)  # says which names there are
        if not (name.endswith(".safetensors") or Path(name).exists()):
            architecture(name)
        return _from_file(Path(name), source=name, asked=asked)
    if weights is None:
        bundled = WEIGHTS / f"{name}.safetensors"
        if not bundled.is_file():
            raise CheckpointError(
                f"{name}: no weights come with it; make some with `tilepipe train`, give a file "
                f"with --weights FILE, or try --weights random:0"
            )
        return _from_file(bundled, source="bundled", asked=asked, name=name)
    file = at_home(str(weights))
    seed = parse_seed(file)
    if seed is None:
        return _from_file(Path(file), source=file, asked=asked, name=name)
    arguments = {**({} if base is None else {"base": base}), **options}
    check_arguments(name, arguments)
    net = build(name, in_channels=in_channels or 3, classes=classes or 2, **arguments)
    fill_seeded(net, seed)
    return from_net(net, name=name, arguments=arguments, source=f"random:{seed}")


def model_for(spec: JobSpec, *, image_channels: int) -> Model:
    """Load the network that a job's settings name, for an image of so many channels.

    Random weights are made to fit; those of a file say themselves what they take.

    Raises what ``load_model`` does.
    """
    return load_model(
        spec.model,
        weights=spec.weights,
        in_channels=image_channels if (spec.weights or "").startswith("random:") else None,
        classes=spec.classes,
        base=spec.base,
        options=spec.options,
    )


def from_net(
    net: Net,
    *,
    name: str,
    arguments: Mapping[str, Any],
    source: str,
    classes: Sequence[LabelClass] | None = None,
    normalisation: Normalisation | None = None,
    mpp: float | None = None,
    locality: Locality | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Model:
    """Make a Model of a training form, without touching it."""
    module = net.inference()
    return Model(
        name=name,
        module=module,
        arguments=dict(arguments),
        in_channels=net.in_channels,
        n_outputs=net.classes,
        classes=tuple(classes or default_classes(2 if net.classes == 1 else net.classes)),
        normalisation=normalisation or Normalisation(),
        mpp=mpp,
        locality=locality_of(name, arguments, locality),
        sha256=hash_weights(weights_of(net)),
        source=source,
        policy=module.policy,
        extra=dict(extra or {}),
    )


def from_module(
    module: nn.Module,
    *,
    name: str,
    in_channels: int,
    outputs: int,
    classes: Sequence[LabelClass] | None = None,
    normalisation: Normalisation | None = None,
    mpp: float | None = None,
    declared_halo_px: int | None = None,
) -> Model:
    """Make a Model of any ``nn.Module`` that maps (B, C, Y, X) to logits; it is probed.

    A declared halo that is too small is corrected, with a warning that shows both numbers.
    """
    from tilepipe.models.probe import probe

    locality = probe(module, in_channels=in_channels)
    if declared_halo_px is not None:
        check_halo(declared_halo_px, locality, name=name)
    form = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
    return Model(
        name=name,
        module=form,
        arguments={},
        in_channels=in_channels,
        n_outputs=outputs,
        classes=tuple(classes or default_classes(2 if outputs == 1 else outputs)),
        normalisation=normalisation or Normalisation(),
        mpp=mpp,
        locality=locality,
        sha256=hash_weights(weights_of(form)),
        source="module",
    )


def _from_file(
    path: Path, *, source: str, asked: Mapping[str, Any], name: str | None = None
) -> Model:
    header, net = read_checkpoint(path, model=name)
    if name is not None and header.architecture != name:
        raise CheckpointError(
            f"{path}: holds weights of {header.architecture}, not {name}; "
            f"use --model {header.architecture}"
        )
    _check_asked(header, asked, source=str(path))
    return from_net(
        net,
        name=header.architecture,
        arguments=header.arguments,
        source=source,
        classes=header.classes,
        normalisation=normalisation_of(header.normalisation),
        mpp=header.mpp,
        locality=Locality.from_json(header.locality) if header.locality else None,
        extra=header.extra,
    )


def _check_asked(header: Header, asked: Mapping[str, Any], *, source: str) -> None:
    """Raise CheckpointError unless what is asked for is what the weights were made with.

    ``asked`` holds ``in_channels``, ``outputs``, ``base`` and options; None: not asked. Where the
    header is silent about an option, the network has the constructor's default.
    """
    recorded = {
        "base": architecture(header.architecture).default_base,
        **option_defaults(header.architecture),
        **header.arguments,
        "in_channels": header.in_channels,
        "outputs": header.outputs,
    }
    for key, value in asked.items():
        if key not in recorded:
            check_arguments(header.architecture, (key,))
        elif value is not None and _plain(recorded[key]) != _plain(value):
            raise CheckpointError(
                f"{source}: its weights have {key} {recorded[key]}; {value} was asked for; "
                f"{_instead(header, key, value, source=source)}"
            )


def _instead(header: Header, key: str, value: Any, *, source: str) -> str:
    """Say what to do where weights were not made with ``key`` ``value``."""
    if not fits(header.architecture, header.arguments, key, value):
        return "leave it out, or give other weights"
    return (
        f"leave it out, or make such weights of them: `tilepipe convert {argument(source)} "
        f"OUT.safetensors --model {header.architecture} --option {key}={str(value).lower()}`"
    )


def _native(value: Any) -> Any:
    """Return a number or array of numpy as Python's own."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _plain(value: Any) -> Any:
    """Return lists as tuples: JSON knows lists only."""
    return tuple(value) if isinstance(value, list) else value


def locality_of(
    name: str, arguments: Mapping[str, Any], recorded: Locality | None = None
) -> Locality:
    """Return the locality of an architecture: the table's, ``recorded``, or the probe's.

    ``recorded`` is a checkpoint's own word, believed only where the table has none.
    """
    options = {key: value for key, value in arguments.items() if key not in _WIDTH_ONLY}
    if not options and name in recorded_localities():
        return recorded_localities()[name]
    if recorded is not None:
        return recorded
    frozen = tuple(sorted((key, _plain(value)) for key, value in options.items()))
    return _probed(name, frozen)


# Width, dropout and norms (BatchNorm in eval is a scale) do not change what a network sees.
_WIDTH_ONLY = frozenset({"base", "widths", "dropout", "norm"})


@lru_cache(maxsize=64)
def _probed(name: str, options: tuple[tuple[str, Any], ...]) -> Locality:
    from tilepipe.models.probe import probe_architecture

    try:
        return probe_architecture(name, dict(options))
    except ModelError as error:
        raise ModelError(f"{name} with {dict(options)} cannot be probed: {error}") from error
