"""Error classes: what was wrong, where, and what to do next, in one message.

Every error is also a builtin, so that a caller who knows nothing of tilepipe can still catch it.
The command line prints the message and exits with 1; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


class TilepipeError(Exception):
    """Anything that tilepipe says no to."""


class SpecError(TilepipeError, ValueError):
    """Settings that contradict each other or are out of range."""


def argument(path: object) -> str:
    """Return a path as a shell takes it, for a command that is to be copied from a message."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class SlideError(TilepipeError, ValueError):
    """An input image that cannot be read as asked."""


class DamageError(SlideError):
    """Pixels of an input that cannot be decoded; names file, level, tile and pixel box."""


class PlanError(TilepipeError, ValueError):
    """A job that cannot run as asked; nothing has been written yet."""


class ModelError(TilepipeError, ValueError):
    """A network that is unknown, or cannot be built or run as asked."""


class ShapeError(ModelError):
    """An input of a size that the network cannot take; names the next legal one."""


class CheckpointError(ModelError):
    """Weights that cannot be read, do not fit, or would execute code."""


class StoreError(TilepipeError, OSError):
    """An output that cannot be created, read or written."""


class MismatchError(StoreError):
    """An output that belongs to another job: other model, weights, plan or input."""


class JournalError(StoreError):
    """A journal record that cannot be believed."""


class ScheduleError(TilepipeError, RuntimeError):
    """A scheduler or worker that cannot be reached or keeps failing."""


class UnfitError(ScheduleError):
    """A worker on which no unit of a job can be done: it lacks a path, or has another file."""


class UnitsFailedError(TilepipeError, RuntimeError):
    """Some units of a job kept failing; the others are done and the store says so."""


class VerifyError(TilepipeError, RuntimeError):
    """A finished result that does not equal what it should be."""


class TrainError(TilepipeError, ValueError):
    """Training that cannot start or go on."""


class ExportError(TilepipeError, ValueError):
    """A result that cannot be written in the form asked for."""


SPATIALDATA = "spatialdata_attrs"
"""What the spatialdata package writes to its stores and to the images in them."""


def no_image_said(location: str, attributes: Mapping[str, Any]) -> str:
    """Say what an OME-Zarr group without multiscales is, and what to give instead."""
    plate = attributes.get("plate")
    if isinstance(plate, Mapping):
        wells = plate.get("wells")
        first = wells[0] if isinstance(wells, list) and wells else {}
        well = first.get("path", "A/1") if isinstance(first, Mapping) else "A/1"
        return f"holds a plate of many images; give one of them, e.g. {location}/{well}/0"
    if "well" in attributes or "bioformats2raw.layout" in attributes:
        return f"holds images in folders of their own; give one of them, e.g. {location}/0"
    if SPATIALDATA in attributes:
        return f"a SpatialData store; give one of its images, {location}/images/NAME, and -o"
    return "a Zarr group without OME multiscales; want an OME-Zarr image"
