"""Checkpoints: safetensors with a ``Header``; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tilepipe.errors import CheckpointError, ModelError
from tilepipe.models.header import Header, normalisation_json
from tilepipe.models.locality import Locality
from tilepipe.models.net import Net
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.registry import build
from tilepipe.spec import LabelClass

# BatchNorm counts its batches; inference does not use the count.
_IGNORED = "num_batches_tracked"


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor, float32 on the CPU: parameters and running statistics."""
    return {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in module.state_dict().items()
        if not name.endswith(_IGNORED)
    }


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over names, shapes and float32 bytes in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: str | Path,
    module: Net,
    *,
    name: str,
    arguments: Mapping[str, Any],
    classes: Sequence[LabelClass],
    normalisation: Normalisation,
    mpp: float | None = None,
    locality: Locality | None = None,
    extra: Mapping[str, Any] | None = None,
    storage: Literal["fp32", "fp16"] = "fp32",
) -> str:
    """Write the weights of a training form atomically; return their sha256.

    ``arguments`` are those of ``build`` beyond channels and classes (base and options).
    ``storage="fp16"`` halves the file; the hash is of what will be read back.
    """
    target = Path(path)
    header = Header(
        architecture=name,
        arguments=dict(arguments),
        in_channels=module.in_channels,
        outputs=module.classes,
        classes=tuple(classes),
        normalisation=normalisation_json(normalisation),
        mpp=mpp,
        locality=locality.to_json() if locality else None,
        extra=dict(extra or {}),
    )
    weights = weights_of(module)
    if storage == "fp16":
        weights = {key: tensor.to(torch.float16) for key, tensor in weights.items()}
    _check_finite(weights, source=str(target))
    partial = target.with_name(target.name + ".partial")
    try:
        save_file(weights, str(partial), metadata=header.to_metadata())
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    return hash_weights(weights)


def read_header(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself, as plain checked values, without its tensors."""
    return open_header(path).model_dump(mode="json")


def open_header(path: str | Path) -> Header:
    """Read what a checkpoint says about itself, without its tensors."""
    with _opened(path) as file:
        return Header.from_metadata(file.metadata(), source=str(path))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file as float32."""
    try:
        with _opened(path) as file:
            return {key: _as_float32(file.get_tensor(key), f"{path}: {key}") for key in _keys(file)}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def read_checkpoint(path: str | Path) -> tuple[Header, Net]:
    """Return header and training form (eval, float32, CPU) of a checkpoint."""
    header = open_header(path)
    with _opened(path) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in _keys(file)}
    try:
        # Nothing is allocated before the shapes are known to be those of the file.
        with torch.device("meta"):
            net = build(
                header.architecture,
                in_channels=header.in_channels,
                classes=header.outputs,
                **_plain(header.arguments),
            )
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    problem = describe_mismatch(wanted_shapes(net), found)
    if problem:
        raise CheckpointError(f"{path}: the weights do not fit {header.architecture}:\n{problem}")
    weights = read_tensors(path)
    _check_finite(weights, source=str(path))
    fill(net, weights)
    return header, net.eval()


def fill(net: Net, weights: Mapping[str, Tensor]) -> None:
    """Give a net on the meta device (or not) the tensors of ``weights``, in place."""
    net.load_state_dict(
        {key: tensor.clone() for key, tensor in weights.items()}, strict=False, assign=True
    )
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    for parameter in net.parameters():
        parameter.requires_grad_(True)


def wanted_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that a checkpoint of ``net`` holds."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in net.state_dict().items()
        if not name.endswith(_IGNORED)
    }


def describe_mismatch(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], most: int = 20
) -> str:
    """Return both sides' unmatched keys and the shapes that differ; "" if all match."""
    lines: list[str] = []
    missing = sorted(set(wanted) - set(found))
    spare = sorted(set(found) - set(wanted))
    differ = sorted(key for key in set(wanted) & set(found) if wanted[key] != found[key])
    for title, rows in (
        ("the network wants", [f"{key} {wanted[key]}" for key in missing]),
        ("the file has", [f"{key} {found[key]}" for key in spare]),
        ("shapes differ", [f"{key}: wants {wanted[key]}, file {found[key]}" for key in differ]),
    ):
        if rows:
            lines.append(f"  {title} ({len(rows)}):")
            lines += [f"    {row}" for row in rows[:most]]
            if len(rows) > most:
                lines.append(f"    … and {len(rows) - most} more")
    return "\n".join(lines)


def _keys(file: Any) -> list[str]:
    return list(file.keys())


def _opened(path: str | Path) -> Any:
    target = Path(path)
    if target.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{target}: is a pickle; turn it into weights with "
            f"`tilepipe convert {target} OUT.safetensors --model NAME`"
        )
    if not target.is_file():
        raise CheckpointError(f"{target}: no such weights file")
    try:
        with target.open("rb") as stream:
            stream.read(1)
        return safe_open(os.fspath(target), framework="pt", device="cpu")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{target}: not a safetensors file: {str(error)[:300]}") from error


def _as_float32(tensor: Tensor, source: str) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{source}: has dtype {tensor.dtype}; weights are floats")
    return tensor.to(torch.float32)


def _check_finite(weights: Mapping[str, Tensor], *, source: str) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinity")


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    reserved = {"name", "in_channels", "classes"} & set(arguments)
    if reserved:
        raise ModelError(f"arguments may not name {', '.join(sorted(reserved))}")
    return dict(arguments)
