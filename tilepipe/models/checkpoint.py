"""Checkpoints: safetensors with a ``Header``; nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tilepipe.errors import CheckpointError, ModelError
from tilepipe.models.header import KEY, Header, converting, normalisation_json
from tilepipe.models.locality import Locality
from tilepipe.models.net import Net
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.registry import build, check_arguments
from tilepipe.spec import LabelClass

_PARTIAL = ".partial"
_LEFT_AFTER_S = 600.0
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
    Raises CheckpointError for settings that a header cannot hold, and where nothing can be written.
    """
    target = Path(path)
    header = Header.checked(
        {
            "architecture": name,
            "arguments": dict(arguments),
            "in_channels": module.in_channels,
            "outputs": module.classes,
            "classes": tuple(classes),
            "normalisation": normalisation_json(normalisation),
            "mpp": mpp,
            "locality": locality.to_json() if locality else None,
            "extra": dict(extra or {}),
        },
        source=str(target),
    )
    metadata = header.to_metadata(source=str(target))
    weights = weights_of(module)
    _check_finite(weights, source=str(target))
    if storage == "fp16":
        weights = {key: tensor.to(torch.float16) for key, tensor in weights.items()}
        _check_finite(weights, source=str(target), found="numbers beyond fp16; store fp32")
    write_tensors(target, weights, metadata=metadata)
    return hash_weights(weights)


def write_tensors(
    target: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file beside ``target``, then rename it: a kill leaves old or new.

    Raises CheckpointError where it cannot be written, and where ``target`` is no regular file.
    """
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{target}: is not a regular file; choose another name")
    try:
        with taking_the_name_of(target) as partial:
            # safetensors makes files for their owner alone; ours are as open as the umask says.
            partial.touch()
            mode = partial.stat().st_mode
            save_file(dict(tensors), str(partial), metadata=dict(metadata))
            partial.chmod(mode)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
    except SafetensorError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error


@contextlib.contextmanager
def taking_the_name_of(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; the file takes its name only if all went well.

    It has a name of its own: what two processes write to one at once would be in one file. Those
    that a process left which was killed go after ten minutes, when one such file is written again.
    Raises CheckpointError where it cannot be written.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        _remove_left(target)
        yield partial
        partial.replace(target)
    except OSError as error:
        # Of a write to a full disk the system names no file, and nobody asked for the partial one.
        reason = error.strerror or error
        raise CheckpointError(f"{target}: cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _remove_left(target: Path) -> None:
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.name.endswith(_PARTIAL):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_AFTER_S:
                    path.unlink()


def read_header(path: str | Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself, as plain checked values, without its tensors."""
    return open_header(path).model_dump(mode="json")


def open_header(path: str | Path, *, model: str | None = None) -> Header:
    """Read what a checkpoint says about itself, without its tensors.

    ``model``: the architecture that it is said to be of, for what to do where it is no checkpoint.
    """
    with _opened(path, model=model) as file:
        return Header.from_metadata(file.metadata(), source=str(path), model=model)


def find_header(path: str | Path) -> Header | None:
    """Read a safetensors file's header if it has one: None of another program's weights."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        return Header.from_metadata(metadata, source=str(path)) if KEY in metadata else None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, as it is."""
    try:
        with _opened(path) as file:
            return {key: file.get_tensor(key) for key in _keys(file)}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error


def read_checkpoint(path: str | Path, *, model: str | None = None) -> tuple[Header, Net]:
    """Return header and training form (eval, float32, CPU) of a checkpoint; see ``open_header``."""
    header = open_header(path, model=model)
    arguments: dict[str, Any] = dict(header.arguments)
    with _opened(path) as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in _keys(file)}
    try:
        check_arguments(header.architecture, arguments)
        # Nothing is allocated before the shapes are known to be those of the file.
        with torch.device("meta"):
            net = build(
                header.architecture,
                in_channels=header.in_channels,
                classes=header.outputs,
                **arguments,
            )
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    problem = describe_mismatch(wanted_shapes(net), found)
    if problem:
        raise CheckpointError(f"{path}: the weights do not fit {header.architecture}:\n{problem}")
    weights = as_float32(read_tensors(path), source=str(path))
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


def _opened(path: str | Path, *, model: str | None = None) -> Any:
    target = Path(path)
    if target.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"{target}: is a pickle; turn it into weights with {converting(target, model)}"
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


def as_float32(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return the tensors as float32; CheckpointError for one whose numbers would not survive."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {key} has dtype {tensor.dtype}; weights are floats")
        if tensor.layout is not torch.strided or tensor.is_meta:
            form = "no numbers" if tensor.is_meta else f"the layout {tensor.layout}"
            raise CheckpointError(f"{source}: {key} has {form}; save dense tensors")
        # Of one number a pickle makes a tensor of any shape, which as float32 would take memory.
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{source}: {key} has the shape {tuple(tensor.shape)} and fewer numbers; save "
                "tensors that are contiguous()"
            )
    return {key: tensor.detach().to(torch.float32) for key, tensor in tensors.items()}


def _check_finite(
    weights: Mapping[str, Tensor], *, source: str, found: str = "NaN or infinity"
) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds {found}")
