"""The frozen settings of a job (TOML in, JSON out) and the values that every wing shares."""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tilepipe.errors import SpecError

Device = str
Precision = Literal["auto", "fp32", "bf16", "fp16"]
OmeZarrVersion = Literal["0.5", "0.4"]
Color = tuple[int, int, int, int]

_PALETTE: tuple[Color, ...] = (
    (0, 0, 0, 0),
    (230, 75, 53, 255),
    (0, 160, 135, 255),
    (60, 84, 136, 255),
    (243, 155, 127, 255),
    (132, 145, 180, 255),
    (145, 209, 194, 255),
    (220, 0, 0, 255),
    (126, 97, 72, 255),
    (176, 156, 133, 255),
    (77, 187, 213, 255),
)


ClassName = Annotated[str, Field(min_length=1, max_length=200)]

LARGEST_PIXEL = 1e30
"""Of floats. What is beyond, to either side, is no measurement: GDAL and others write the ends of
float32 where there are no data, and in a network a number like that overflows."""
OBJECTS_SUFFIX = "-instances"
"""What a mask's name and this make the name of the label of its objects."""
_NAME_LIMIT = 100


class LabelClass(BaseModel):
    """One class of a mask: its name and display colour (red, green, blue, alpha; 0-255)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassName
    color: Color

    @field_validator("color")
    @classmethod
    def _bytes(cls, color: Color) -> Color:
        if any(not 0 <= part <= 255 for part in color):
            raise ValueError("the parts of a colour are 0-255")
        return color


def unlike(names: Sequence[str]) -> None:
    """Raise ValueError if two classes have one name: areas and scores are told by name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two classes are called {twice[:80]!r}; each needs a name of its own")


def default_classes(count: int) -> tuple[LabelClass, ...]:
    """Return ``count`` classes named background, class 1, … in well-told-apart colours."""
    return tuple(class_at(value) for value in range(count))


def class_at(value: int, classes: Sequence[LabelClass] = ()) -> LabelClass:
    """Return a class by its value; one that ``classes`` does not hold is called by that.

    >>> class_at(3).name
    'class 3'
    """
    if value < len(classes):
        return classes[value]
    return LabelClass(
        name="background" if value == 0 else f"class {value}",
        color=_PALETTE[value] if value < len(_PALETTE) else _spread_color(value),
    )


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes, by value, so that no two are one; the value is added to those.

    >>> distinct_names(("background", "cell", "cell"))
    ('background', 'cell (1)', 'cell (2)')
    """
    counts = Counter(names)
    if max(counts.values(), default=0) < 2:
        return tuple(names)
    told = [f"{name} ({k})" if counts[name] > 1 else name for k, name in enumerate(names)]
    return distinct_names(told)


def _spread_color(value: int) -> Color:
    # Knuth's multiplicative hash: neighbours in value are far apart in colour.
    mixed = (value * 2654435761) & 0xFFFFFF
    return 64 + (mixed >> 16) % 192, 64 + (mixed >> 8) % 192, 64 + mixed % 192, 255


class JobSpec(BaseModel):
    """Every setting of ``tilepipe run``. None means: not said, the plan decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "unet"
    weights: str | None = None
    """File, or ``random:SEED``; None takes the bundled weights."""
    classes: int | None = Field(default=None, ge=1, le=255)
    base: int | None = Field(default=None, ge=1, le=1024)
    """Channels of the first level, for ``random:``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the architecture, for ``random:``."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+ -]{0,99}$")
    """Label name; default the model's."""
    level: int | None = Field(default=None, ge=0, le=30)
    mpp: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    slide_mpp: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    device: Device = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Precision = "auto"
    backend: Literal["auto", "torch", "openvino"] = "auto"
    tune: bool = True
    tolerance: float = Field(default=0.001, ge=0, le=1)
    """Share of pixels that reduced precision may flip before it falls back to fp32."""
    tile: int | None = Field(default=None, ge=1, le=65536)
    """None and ``auto`` are one, for ``batch`` too."""
    batch: int | None = Field(default=None, ge=1, le=1024)
    halo: int | None = Field(default=None, ge=0, le=16384)
    exact: bool = False
    """Force the full context where one exists."""
    cgm: Literal["off", "tile", "slide"] = "off"
    unit: int | None = Field(default=None, ge=1, le=65536)
    """Side of a write unit, px."""
    workers: int | None = Field(default=None, ge=1, le=4096)
    gpus: str | None = None
    scheduler: str = "local"
    part: str | None = Field(default=None, pattern=r"^\d+/\d+$")
    retries: int = Field(default=3, ge=0, le=100)
    ome_zarr: OmeZarrVersion = "0.5"
    on_damage: Literal["error", "fill"] = "error"
    max_pixels: int = Field(default=2**40, ge=1)
    tissue: str = "off"
    """auto, off, or the path of a mask image."""
    in_place: bool = False
    instances: bool = False
    probabilities: bool = False
    """Also write the probabilities of the foreground classes, as bytes."""
    overwrite: bool = False

    @field_validator("tile", "batch", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator(
        "classes", "base", "level", "mpp", "slide_mpp", "tolerance", "tile", "batch", "halo",
        "unit", "workers", "retries", "max_pixels", mode="before",
    )  # fmt: skip
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # a level of true is not level 1
            raise ValueError("a number is wanted, not true or false")  # noqa: TRY004 - for pydantic
        return value

    @field_validator("model", "weights", "tissue", "scheduler")
    @classmethod
    def _nameable(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("names nothing; give a name, or leave it out")
        if text is not None and "://" not in text and not is_path(text):
            raise ValueError("no file can have such a name")
        return text if text is None else at_home(text)

    @field_validator("options")
    @classmethod
    def _plain(cls, options: dict[str, Any]) -> dict[str, Any]:
        return plain_options(options)

    @field_validator("part")
    @classmethod
    def _part(cls, part: str | None) -> str | None:
        if part is not None:
            share, total = (int(number) for number in part.split("/"))
            if total == 0:
                raise ValueError(f"part {part}: there is 1 share at least, 0/1")
            if not share < total:
                raise ValueError(
                    f"part {part}: shares are numbered 0/{total} to {total - 1}/{total}"
                )
        return part

    @model_validator(mode="after")
    def _workers(self) -> JobSpec:
        if self.scheduler != "local" and not (self.workers is None and self.gpus is None):
            raise ValueError(
                f"--workers and --gpus start workers on this machine, but --scheduler "
                f"{self.scheduler} has workers of its own; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _objects(self) -> JobSpec:
        most = _NAME_LIMIT - len(OBJECTS_SUFFIX)
        if self.instances and self.name is not None and len(self.name) > most:
            raise ValueError(
                f"instances: the label of the objects is called like the mask, with "
                f"{OBJECTS_SUFFIX} behind it, so the name of {len(self.name)} letters is too long; "
                f"give one of at most {most}"
            )
        return self

    @classmethod
    def checked(cls, values: Mapping[str, Any], *, source: str = "settings") -> JobSpec:
        """Build from plain values; SpecError names each wrong setting."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise SpecError(f"{source}: {explain(error)}") from error

    @classmethod
    def from_toml(cls, path: Path, **flags: Any) -> JobSpec:
        """Read a job file; ``flags`` win. Paths in it are relative to the file's folder."""
        values = read_toml(path)
        for key, value in values.items():
            if isinstance(value, str) and is_path(value) and _names_file(key, value):
                values[key] = str(resolved(path.parent / at_home(value)))
        return cls.checked(overridden(values, flags), source=str(path))

    def replace(self, **changes: Any) -> JobSpec:
        """Return the settings with some changed, checked again."""
        return self.checked({**self.model_dump(), **changes})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return self.model_dump(mode="json")


def overridden(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job file's values where no flag wins; of the network's options, one by one.

    >>> overridden({"base": 4, "options": {"depth": 2}}, {"options": {"dropout": 0.1}})
    {'base': 4, 'options': {'depth': 2, 'dropout': 0.1}}
    """
    merged = {**values, **flags}
    mine, theirs = flags.get("options"), values.get("options")
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        merged["options"] = {**theirs, **mine}
    return merged


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a network's options; ValueError for what JSON, in which they are kept, has not."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options are finite numbers, words and lists of them: {error}") from None
    return options


def _names_file(key: str, value: str) -> bool:
    """Tell whether a setting of a job file is the path of a file, not a word."""
    return (
        (key == "weights" and not value.startswith("random:"))
        or (key == "model" and value.endswith(".safetensors"))
        or (key == "tissue" and value not in ("auto", "off"))
        or (key == "scheduler" and value != "local")
    )


def at_home(path: str) -> str:
    """Return a path with the home folder for ``~``, which no shell has put there in a call.

    A name that begins so and is no user's stays: files may be called ``~old.tif``.
    """
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises where there is no such user


def resolved(path: str | Path) -> Path:
    """Return where a path leads once links are followed.

    One that leads to itself is left there: whoever opens it says so, as of any file that cannot be.
    """
    return Path(os.path.realpath(path))


def is_path(text: str) -> bool:
    """Tell whether the file system can be asked for ``text`` at all."""
    parts = text.split("/")
    return (
        "://" not in text
        and "\0" not in text
        and len(text) < 4096
        and all(len(part.encode("utf-8", "surrogatepass")) < 256 for part in parts)
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; SpecError says what is wrong with it. Keys may use ``-`` or ``_``."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > 1 << 20:
        raise SpecError(f"{path}: {len(raw)} bytes is too large for a settings file")
    try:
        values = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise SpecError(f"{path}: not TOML: {error}") from error
    return {key.replace("-", "_"): value for key, value in values.items()}


def explain(error: ValidationError) -> str:
    """Say in one line which settings are wrong and why."""
    parts = []
    for problem in error.errors(include_url=False)[:5]:
        where = ".".join(str(part) for part in problem["loc"])[:200]
        what = problem["msg"].removeprefix("Value error, ")[:300]
        if problem["type"] == "extra_forbidden":
            parts.append(f"{where}: no such setting")
        elif not where:
            parts.append(what)  # about several settings: all of them would be said
        else:
            parts.append(f"{where}: {what} (got {str(problem.get('input'))[:80]!r})")
    return "; ".join(parts)
