"""The frozen settings of ``tilepipe train``: flags or TOML in, JSON in the weights' header out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tilepipe.errors import SpecError
from tilepipe.models.header import MAX_MPP
from tilepipe.spec import (
    ClassName,
    at_home,
    explain,
    is_path,
    overridden,
    plain_options,
    read_toml,
    resolved,
    unlike,
)
from tilepipe.train.augment import AugmentSpec
from tilepipe.train.targets import Target

_LARGEST = 1e30
"""Of a number that counts as float32, and is summed and multiplied."""
Weight = Annotated[float, Field(ge=0, le=_LARGEST)]
"""How much something counts; below 0 the network would learn to be wrong."""
_PATHS = ("images", "labels", "val", "val_labels", "kinds", "exclude", "out")


class TrainSpec(BaseModel):
    """Every setting of a training. Paths may be relative to the job file that names them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    images: Path
    labels: Path
    out: Path
    """Weights to write, ``.safetensors``; log, curve and state lie beside, by the same name."""
    model: str = "unet"
    val: Path | None = None
    """Folder of validation images with ``val_labels`` beside; None: a seeded split."""
    val_labels: Path | None = None
    val_share: float = Field(default=0.1, ge=0, lt=1)
    exclude: Path | None = None
    """File of names, one a line, that are neither learnt from nor chosen by."""
    kinds: Path | None = None
    """CSV ``id,kind``: splits are even over kinds, metrics are reported per kind."""
    kind_weights: dict[str, Weight] = Field(default_factory=dict)
    """How much more often an image of a kind is drawn; 1 if not named."""

    target: Target = "classes"
    classes: int | None = Field(default=None, ge=1, le=255)
    class_names: tuple[ClassName, ...] = ()
    ring_px: float = Field(default=2.0, ge=1, le=32)
    """How wide the ring of target foreground+border is; its first px is 1 from what is outside."""
    in_channels: int | None = Field(default=None, ge=1, le=64)
    base: int | None = Field(default=None, ge=1, le=1024)
    options: dict[str, Any] = Field(default_factory=dict)
    mpp: float | None = Field(default=None, gt=0, le=MAX_MPP)
    mean: tuple[float, ...] = ()
    """With ``std``: the network sees (share of the dtype's range - mean) / std; one number, or one
    per channel. None: it sees the share."""
    std: tuple[float, ...] = ()

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)
    batch: int = Field(default=4, ge=1, le=4096)
    output_px: int = Field(default=256, ge=1, le=8192)
    """Side of what a sample teaches; the network's own margin is read around it, mirrored."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = Field(default=None, gt=0, le=_LARGEST)
    """Peak learning rate; None: 0.002 for adamw, 0.01 for sgd."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are what is validated and kept; 0: none."""
    freeze_norm: float = Field(default=0.2, ge=0, le=1)
    """Share of the budget after which BatchNorm uses its running statistics in training too.

    Small batches of unlike images (dark fluorescence, bright stain) have statistics of their own;
    a network that never sees the averaged ones works in training and fails in inference.
    """
    clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm."""

    loss: str = "weighted-ce"
    """Names with + between; a sum with ``weighted-ce`` is weighted as a whole."""
    class_weights: tuple[Weight, ...] | None = None
    w0: float = Field(default=10.0, ge=0, le=_LARGEST)
    sigma: float = Field(default=5.0, ge=0.01, le=_LARGEST)
    output_weights: tuple[Weight, ...] | None = None
    """Deep supervision: the say of each output; None: equal."""
    gate_weight: float = Field(default=1.0, ge=0)
    """UNet 3+ with CGM: weight of its classification loss."""

    augment: AugmentSpec = AugmentSpec()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    store: Literal["fp32", "fp16"] = "fp32"
    """Precision of the numbers in the weights file."""
    seed: int = Field(default=0, ge=0, le=2**43)
    """Each step has a seed of its own, about this times a million, which has to fit in 64 bits."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations; None: some twelve times in the budget, in a fifth of its time."""
    save_every_s: float = Field(default=60.0, ge=0)
    """Seconds between saves of the state that ``--resume`` reads."""

    @field_validator(*_PATHS)
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return path if path is None else Path(at_home(str(path)))

    @field_validator("out")
    @classmethod
    def _weights(cls, out: Path) -> Path:
        # What lies beside is called by another suffix: x.csv and x.png would be written over.
        if out.suffix != ".safetensors":
            raise ValueError("weights are called .safetensors")
        return out

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return plain_options(options)

    @field_validator("class_names")
    @classmethod
    def _unlike(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unlike(names)
        return names

    @field_validator("class_weights", "output_weights")
    @classmethod
    def _not_all_0(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if weights is not None and sum(weights) == 0:
            raise ValueError("one of the weights has to be above 0")
        return weights

    @model_validator(mode="after")
    def _class_weights(self) -> TrainSpec:
        parts = self.loss.split("+")
        if self.class_weights is not None and not {"ce", "weighted-ce"} & set(parts):
            raise ValueError(
                f"class_weights have no say in the loss {self.loss}; add ce to it, or leave them "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _budget(self) -> TrainSpec:
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise ValueError("one of steps, epochs, minutes is needed: when to stop")
        if (self.val is None) != (self.val_labels is None):
            raise ValueError("val and val_labels go together")
        return self

    @classmethod
    def checked(cls, values: Mapping[str, Any], *, source: str = "settings") -> TrainSpec:
        """Build from plain values; SpecError names each wrong setting."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise SpecError(f"{source}: {explain(error)}") from error

    @classmethod
    def from_toml(cls, path: Path, **flags: Any) -> TrainSpec:
        """Read a job file; ``flags`` win. Paths in it are relative to the file's folder."""
        values = read_toml(path)
        for key in _PATHS:
            if isinstance(values.get(key), str):
                if not is_path(values[key]):
                    raise SpecError(f"{path}: {key}: no file can have such a name")
                values[key] = resolved(path.parent / at_home(values[key]))
        return cls.checked(overridden(values, flags), source=str(path))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values; of paths only their last part, no one's folders."""
        values = self.model_dump(mode="json")
        for key in _PATHS:
            if values[key] is not None:
                values[key] = Path(values[key]).name
        return values
