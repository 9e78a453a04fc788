"""``Header``: what a checkpoint says about itself, read as untrusted input."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tilepipe.errors import CheckpointError, ModelError, argument
from tilepipe.models.locality import Locality
from tilepipe.models.normalisation import Normalisation
from tilepipe.spec import LabelClass, explain, unlike

KEY = "tilepipe"
VERSION = 1
MAX_BYTES = 1 << 20
"""Of the JSON; what is longer is neither written nor read."""
MAX_MPP = 1e6

Scalar = bool | int | float | str | None
Argument = Scalar | list[Scalar]


class Header(BaseModel):
    """The JSON under the key ``tilepipe`` of a safetensors file's metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    architecture: str = Field(min_length=1, max_length=100)
    arguments: dict[str, Argument] = Field(default_factory=dict, max_length=50)
    """Arguments of ``build`` beyond channels and classes: base and options."""
    in_channels: int = Field(ge=1, le=1024)
    outputs: int = Field(ge=1, le=255)
    """Channels of the logits: 1 is a sigmoid over two classes."""
    classes: tuple[LabelClass, ...] = Field(min_length=2, max_length=255)
    normalisation: dict[str, Any] = Field(default_factory=lambda: {"kind": "unit"})
    mpp: float | None = Field(default=None, gt=0, le=MAX_MPP)
    """µm per px that the network was trained at."""
    locality: dict[str, Any] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further facts. Of a training its step, metric, settings and data, and ``scores``, one for
    each kind of image: null where they are too many for a header; the CSV log has them."""

    @field_validator("normalisation")
    @classmethod
    def _normalisation(cls, values: dict[str, Any]) -> dict[str, Any]:
        normalisation_of(values)
        return values

    @field_validator("locality")
    @classmethod
    def _locality(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        if values is not None:
            Locality.from_json(values)
        return values

    def model_post_init(self, context: Any, /) -> None:
        """Hold classes against outputs and one another, and means against channels."""
        wanted = 2 if self.outputs == 1 else self.outputs
        if len(self.classes) != wanted:
            raise ValueError(
                f"{len(self.classes)} classes for {self.outputs} outputs; wanted {wanted}"
            )
        unlike([entry.name for entry in self.classes])
        normalisation_of(self.normalisation).check_channels(self.in_channels)

    def to_metadata(self, *, source: str) -> dict[str, str]:
        """Return the safetensors metadata; CheckpointError if it could not be read again."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        if len(text) > MAX_BYTES:
            raise CheckpointError(
                f"{source}: the header would have {len(text)} bytes; at most {MAX_BYTES} are read; "
                "shorten its names, settings or further facts"
            )
        return {KEY: text}

    @classmethod
    def from_metadata(
        cls, metadata: dict[str, str] | None, *, source: str, model: str | None = None
    ) -> Header:
        """Read the metadata of a safetensors file; CheckpointError says what is wrong.

        ``model``: the architecture that it is said to be of, for what to do next.
        """
        text = (metadata or {}).get(KEY)
        if text is None:
            raise CheckpointError(
                f"{source}: has no tilepipe header; turn a plain state dict into weights with "
                f"{converting(source, model)}"
            )
        if len(text) > MAX_BYTES:
            raise CheckpointError(
                f"{source}: the header has {len(text)} bytes; at most {MAX_BYTES} are read"
            )
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source}: the header is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{source}: the header is not a JSON object")
        version = values.get("version")
        if version != VERSION:
            raise CheckpointError(
                f"{source}: the header has version {str(version)[:50]}; this tilepipe reads "
                f"{VERSION}; get a tilepipe as new as the file"
            )
        return cls.checked(values, source=source)

    @classmethod
    def checked(cls, values: dict[str, Any], *, source: str) -> Header:
        """Build from plain values; CheckpointError says what is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise CheckpointError(f"{source}: the header is wrong: {explain(error)}") from error
        except (ModelError, TypeError) as error:
            raise CheckpointError(f"{source}: the header is wrong: {error}") from error


def converting(source: object, model: str | None) -> str:
    """Say how to make weights of a plain state dict, of architecture ``model`` if that is known."""
    command = f"`tilepipe convert {argument(source)} OUT.safetensors --model {model or 'NAME'}`"
    return command if model else f"{command}, NAME being a line of `tilepipe models`"


def normalisation_of(values: dict[str, Any]) -> Normalisation:
    """Build a Normalisation from plain values; ModelError if they are not one."""
    known = {"kind", "mean", "std"}
    kind = values.get("kind", "unit")
    if set(values) - known or kind not in ("unit", "mean-std"):
        raise ModelError(f"normalisation {str(values)[:200]}: wanted kind unit or mean-std")
    try:
        mean = tuple(float(value) for value in values.get("mean", ()))
        std = tuple(float(value) for value in values.get("std", ()))
    except (TypeError, ValueError) as error:
        raise ModelError(f"normalisation: mean and std are lists of numbers: {error}") from error
    return Normalisation(kind, mean, std)


def normalisation_json(normalisation: Normalisation) -> dict[str, Any]:
    """Return plain values of a Normalisation."""
    if normalisation.kind == "unit":
        return {"kind": "unit"}
    return {
        "kind": normalisation.kind,
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
    }
