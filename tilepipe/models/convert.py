"""Foreign state dicts into checkpoints: renaming, fitting, and saying what does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from tilepipe.errors import CheckpointError
from tilepipe.models.blocks import ConvBlock
from tilepipe.models.checkpoint import (
    as_float32,
    describe_mismatch,
    fill,
    find_header,
    read_tensors,
    save_checkpoint,
    wanted_shapes,
)
from tilepipe.models.fitting import assumed_of
from tilepipe.models.header import Header, normalisation_of
from tilepipe.models.locality import check_halo
from tilepipe.models.model import locality_of
from tilepipe.models.net import Net
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.pickles import read_pickle
from tilepipe.models.registry import build, check_arguments, option_names
from tilepipe.spec import ClassName, LabelClass, default_classes, explain, read_toml


class Rename(BaseModel):
    """One regular expression; every match in a key is replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    pattern: str = Field(alias="from", max_length=1000)
    replacement: str = Field(alias="to", max_length=1000)


class KeyMap(BaseModel):
    """How the keys of a foreign state dict become ours, and what the file cannot say itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: tuple[str, ...] = ()
    """Regular expressions; keys that match from the start are left out."""
    prefix: dict[str, str] = Field(default_factory=dict)
    """Old prefix → new; the longest that fits is applied, once."""
    regex: tuple[Rename, ...] = ()
    """Applied after the prefixes, in order."""
    in_channels: int | None = Field(default=None, ge=1, le=1024)
    outputs: int | None = Field(default=None, ge=1, le=255)
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Base and options of the architecture."""
    class_names: tuple[ClassName, ...] = ()
    mpp: float | None = Field(default=None, gt=0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    declared_halo: int | None = Field(default=None, ge=0, le=1 << 20)
    """Halo in px that the weights' publisher states; held against the probe."""
    spread: tuple[float, ...] = ()
    """Shares of each input channel that a one-channel network reads, e.g. [0, 0, 1] for blue."""
    swap: tuple[str, ...] = ()
    """Regular expressions of our names; of these convolutions the two halves of the input channels
    change places: of a network that joins two maps the other way round."""

    @classmethod
    def from_toml(cls, path: Path) -> KeyMap:
        """Read a map file; CheckpointError says what is wrong."""
        values = read_toml(path)
        try:
            found = cls(**values)
            rules = (rule.pattern for rule in found.regex)
            for pattern in (*found.drop, *rules, *found.swap):
                re.compile(pattern)
        except ValidationError as error:
            raise CheckpointError(f"{path}: {explain(error)}") from error
        except re.error as error:
            raise CheckpointError(f"{path}: not a regular expression: {error}") from error
        return found

    def rename(self, key: str) -> str | None:
        """Return our name for ``key``, or None to leave it out."""
        if key.endswith("num_batches_tracked") or any(re.match(rule, key) for rule in self.drop):
            return None
        fitting = [old for old in self.prefix if key.startswith(old)]
        if fitting:
            old = max(fitting, key=len)
            key = self.prefix[old] + key[len(old) :]
        for rule in self.regex:
            try:
                key = re.sub(rule.pattern, rule.replacement, key)
            except (re.error, IndexError) as error:  # of a group that the pattern does not have
                raise CheckpointError(
                    f"map: [[regex]] to = {rule.replacement!r} cannot replace from = "
                    f"{rule.pattern!r}: {error}"
                ) from error
        return key

    def apply(self, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
        """Rename every key; CheckpointError if two become one."""
        renamed: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for key, tensor in tensors.items():
            name = self.rename(key)
            if name is None:
                continue
            if name in renamed:
                raise CheckpointError(f"{source}: {origin[name]} and {key} both become {name}")
            renamed[name], origin[name] = tensor, key
        return renamed


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pt`` or ``.pth`` file, as they are."""
    if _is_safetensors(path):
        return read_tensors(path)
    return read_pickle(path)


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def convert(
    source: Path,
    target: Path,
    *,
    model: str,
    key_map: KeyMap | None = None,
    in_channels: int | None = None,
    outputs: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    mpp: float | None = None,
    normalisation: Normalisation | None = None,
    storage: Literal["fp32", "fp16"] = "fp32",
) -> dict[str, Any]:
    """Write ``source``'s weights as a checkpoint of architecture ``model``; return its facts.

    What is given here wins over the map file, and that over the header of weights that are
    tilepipe's already. Warns with both numbers if the map declares a halo
    that is too small. Raises CheckpointError with both sides' unmatched
    keys and shapes if the weights do not fit.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(
            f"{target}: is IN itself, of which all that the map drops would be lost; choose "
            "another OUT"
        )
    rules = key_map or KeyMap()
    header = find_header(source) if _is_safetensors(source) else None
    same = header is not None and header.architecture == model
    of_itself = header.arguments if header is not None and same else {}
    options = {**of_itself, **rules.arguments, **(arguments or {})}
    channels = in_channels or rules.in_channels or (header.in_channels if header else 3)
    logits = outputs or rules.outputs or (header.outputs if header else 2)
    check_arguments(model, options)
    with torch.device("meta"):
        net = build(model, in_channels=channels, classes=logits, **options)
    # Only what is kept has to be weights: counts of batches, for one, are integers.
    tensors = as_float32(rules.apply(read_state(source), source=str(source)), source=str(source))
    wanted = wanted_shapes(net)
    if rules.spread:
        tensors = _spread(tensors, wanted, rules.spread, source=str(source))
    tensors = _swapped(_with_biases(tensors, net), rules.swap, source=str(source))
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problem = describe_mismatch(wanted, found, most=2000)
    if problem:
        # Last of all, where the lists have not scrolled it away.
        raise CheckpointError(
            f"{source}: the weights do not fit {model} ({channels} channels, {logits} outputs, "
            f"{options or 'no options'}):\n{problem}\n{_what_next(model, wanted, found)}"
        )
    fill(net, tensors)
    if normalisation is None and (rules.mean or rules.std):
        normalisation = Normalisation("mean-std", rules.mean, rules.std)
    if normalisation is None:
        normalisation = normalisation_of(header.normalisation) if header else Normalisation()
    if mpp is None:
        mpp = rules.mpp if rules.mpp is not None or header is None else header.mpp
    locality = locality_of(model, options)
    if rules.declared_halo is not None:
        check_halo(rules.declared_halo, locality, name=source.name)
    sha256 = save_checkpoint(
        target,
        net,
        name=model,
        arguments=options,
        classes=_classes(rules.class_names, logits, header),
        normalisation=normalisation,
        mpp=mpp,
        locality=locality,
        extra={**(header.extra if header else {}), "converted_from": source.name},
        storage=storage,
    )
    return {
        "path": str(target),
        "architecture": model,
        "arguments": options,
        "in_channels": channels,
        "outputs": logits,
        "tensors": len(found),
        "sha256": sha256,
        "context_px": locality.context_px,
        "reach_px": locality.reach_px,
        "alignment_px": locality.alignment_px,
        "exact": locality.exact,
        "reason": locality.reason,
        "assumed": []
        if same
        else assumed_of(model, options, outputs=logits, normalisation=normalisation),
    }


def _what_next(
    model: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Say what to do about weights that do not fit: other names, or another network."""
    ours, theirs = (
        Counter(shape for shape in shapes.values() if len(shape) == 4) for shapes in (wanted, found)
    )
    if ours == theirs:
        return "Rename with --map."
    return (
        f"Names aside (--map), {theirs.total()} convolutions of the file are not the network's "
        f"{ours.total()}, or of other shapes: see to --in-channels, --classes, --base and the "
        f"options {', '.join(option_names(model))}, or choose another --model."
    )


def _classes(names: tuple[str, ...], outputs: int, header: Header | None) -> tuple[LabelClass, ...]:
    plain = default_classes(2 if outputs == 1 else outputs)
    if header is not None and len(header.classes) == len(plain):
        plain = header.classes
    if not names:
        return plain
    if len(names) != len(plain):
        raise CheckpointError(f"{len(names)} class names for {len(plain)} classes of the mask")
    return tuple(
        LabelClass(name=name, color=entry.color) for name, entry in zip(names, plain, strict=True)
    )


def _swapped(
    tensors: Mapping[str, Tensor], patterns: tuple[str, ...], *, source: str
) -> dict[str, Tensor]:
    """Let the halves of the input channels of the weights that ``patterns`` name change places."""
    swapped = dict(tensors)
    for pattern in patterns:
        keys = [key for key in tensors if re.fullmatch(pattern, key)]
        if not keys:
            raise CheckpointError(f"{source}: swap {pattern!r} names no weights, once renamed")
        for key in keys:
            tensor = tensors[key]
            if tensor.dim() != 4 or tensor.shape[1] % 2:
                raise CheckpointError(
                    f"{source}: swap {pattern!r} names {key} {tuple(tensor.shape)}; wanted the "
                    "weights of convolutions of two maps with as many channels each"
                )
            swapped[key] = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
    return swapped


def _with_biases(tensors: dict[str, Tensor], net: Net) -> dict[str, Tensor]:
    """Give a convolution before a BatchNorm the bias 0 where the weights hold none.

    The norm's own shift takes a bias's place, so many networks are published without; anywhere
    else a bias that is missing is one that was lost.
    """
    biases: dict[str, Tensor] = {}
    for name, part in net.named_modules():
        if isinstance(part, ConvBlock) and isinstance(part.norm, nn.BatchNorm2d):
            weight = tensors.get(f"{name}.conv.weight")
            if weight is not None and weight.dim():
                biases[f"{name}.conv.bias"] = torch.zeros(len(weight), dtype=weight.dtype)
    return {**biases, **tensors}


def _spread(
    tensors: dict[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    shares: tuple[float, ...],
    *,
    source: str,
) -> dict[str, Tensor]:
    """Let a one-channel network read several: its first weights times each channel's share."""
    spread = dict(tensors)
    for key, shape in wanted.items():
        tensor = tensors.get(key)
        if tensor is None or tuple(tensor.shape) == shape or tensor.dim() != 4:
            continue
        if tensor.shape[1] == 1 and shape[1] == len(shares):
            weight = torch.tensor(shares, dtype=tensor.dtype)[None, :, None, None]
            spread[key] = tensor * weight
            return spread
    raise CheckpointError(
        f"{source}: spread {list(shares)} fits no first convolution of one channel; "
        f"set in_channels = {len(shares)}"
    )
