"""State dicts out of pickles, without running them: what would execute code is refused by name."""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilepipe.errors import CheckpointError

_MAX_BYTES = 16 << 30
_MAX_PICKLE_BYTES = 64 << 20
_MAX_DEPTH = 4
_STARTS = (b"PK", b"\x80")
"""Of a ZIP archive, and of a pickle of protocol 2 or later: what torch.save writes."""
_USUAL = ("state_dict", "model_state_dict", "model", "net", "params_ema", "params", "module")
_HARMLESS = re.compile(
    r"(collections\.OrderedDict|torch\.[A-Za-z]+(Storage|Tensor)|torch\.(_utils\._rebuild_\w+"
    r"|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2|storage\.\w+Storage|Size|device"
    r"|float16|float32|float64|bfloat16|int64))"
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.pt`` or ``.pth`` file through ``weights_only=True`` alone.

    Raises CheckpointError if the file cannot be read, is a program (TorchScript) or would execute
    code; the message names what it would call.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {_MAX_BYTES} are read")
    if _is_program(path):
        raise CheckpointError(
            f"{path}: is a TorchScript program, not a state dict, and would execute code; "
            f"save its state_dict() as safetensors where it was made"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        names = _foreign_globals(path)
        if names:
            raise CheckpointError(
                f"{path}: would execute code: it calls {', '.join(names[:5])}; refused. "
                f"Save only the state_dict() where it was made"
            ) from error
        raise CheckpointError(
            f"{path}: cannot be read as a state dict: {_said(error, path)}"
        ) from error
    return tensors_in(values, source=str(path))


def tensors_in(values: Any, *, source: str) -> dict[str, Tensor]:
    """Find the state dict: under one of the usual keys, else the mapping itself."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source}: holds a {type(values).__name__}, not a state dict")
    found = _tensors_under(values, depth=0)
    if not found:
        keys = ", ".join(str(key)[:40] for key in list(values)[:10])
        raise CheckpointError(f"{source}: no tensors in it, only {keys or 'nothing'}")
    return found


def _tensors_under(values: Mapping[Any, Any], *, depth: int) -> dict[str, Tensor]:
    # A state dict holds no mappings; what lies beside one, such as an epoch, may be a tensor too.
    for key in _USUAL:
        if isinstance(values.get(key), Mapping) and depth < _MAX_DEPTH:
            found = _tensors_under(values[key], depth=depth + 1)
            if found:
                return found
    return {str(key): value for key, value in values.items() if isinstance(value, Tensor)}


def _said(error: Exception, path: Path) -> str:
    """Return what is wrong with the file: how it begins, else the line of torch's message on it."""
    with path.open("rb") as stream:
        start = stream.read(24)
    if not start:
        return "it is empty; copy or download it again"
    if not start.startswith(_STARTS):
        return (
            f"it begins with {start!r}, as nothing does that torch.save writes; give a state dict "
            "saved by torch.save, or a .safetensors file by that name"
        )
    lines = str(error).strip().splitlines()
    for line in lines:
        said = line.partition("WeightsUnpickler error:")[2].strip()
        if said:
            return said[:200]
    return (lines[0] if lines else type(error).__name__)[:200]


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist()
            )
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _foreign_globals(path: Path) -> list[str]:
    """Names outside torch's tensors that the pickles in the file import; nothing is run."""
    found: list[str] = []
    for data in _pickles(path):
        stream = io.BytesIO(data)
        # Files of old torch are several pickles in a row, then the tensors' bytes.
        with contextlib.suppress(Exception):  # where the pickles end, no pickle is found
            while stream.tell() < len(data):
                for name in _globals(stream):
                    if not _HARMLESS.fullmatch(name) and name not in found:
                        found.append(name[:100])
    return found


def _globals(stream: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL" and len(strings) >= 2:
            yield f"{strings[-2]}.{strings[-1]}"
        elif isinstance(argument, str):
            strings.append(argument)


def _pickles(path: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl") and entry.file_size <= _MAX_PICKLE_BYTES:
                    yield archive.read(entry)
    except (zipfile.BadZipFile, ValueError):
        with path.open("rb") as stream:
            yield stream.read(_MAX_PICKLE_BYTES)
    except (OSError, RuntimeError, EOFError):
        return
