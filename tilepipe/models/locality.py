"""``Locality``: how far a network sees, on which grid it repeats itself, which sizes it takes."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tilepipe.errors import ModelError
from tilepipe.tiling import round_up

TABLE = Path(__file__).with_name("locality.json")
Kind = Literal["local", "global", "never"]


@dataclass(frozen=True, slots=True)
class Locality:
    """What the probe measured, px of the network's input."""

    kind: Kind
    """``local``: tiles can be exact; ``global``: each output px depends on the whole input;
    ``never``: what an output px depends on changes with its place."""
    reason: str
    """Why not exact, or "" for a plain local network."""
    context: tuple[int, int, int, int]
    """Top, bottom, left, right: px beyond an output px that its value depends on, for tiles that
    start on the alignment. For ``global`` and ``never``: what was seen on the probe's strip."""
    reach_px: int
    """The same for tiles cut anywhere: the worst over all phases, never less than the context."""
    alignment_px: int
    """Tile starts must be multiples of it."""
    margin_px: int
    """Px per side that the network consumes."""
    least_input_px: int
    input_step_px: int
    """Legal input sides are ``least_input_px + k * input_step_px``."""

    @property
    def context_px(self) -> int:
        """The largest of the four contexts."""
        return max(self.context)

    @property
    def exact(self) -> bool:
        """Tell whether a tiled mask can equal the whole-image mask."""
        return self.kind == "local"

    @property
    def halo_px(self) -> int:
        """Context rounded up to the alignment, at least what the network consumes."""
        beyond = max(0, self.context_px - self.margin_px)
        return self.margin_px + round_up(beyond, self.alignment_px)

    def next_legal(self, px: int) -> int:
        """Return the smallest legal input side that is at least ``px``."""
        return self.least_input_px + round_up(max(0, px - self.least_input_px), self.input_step_px)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "context": list(self.context)}

    @classmethod
    def from_json(cls, values: Any) -> Locality:
        """Read what ``to_json`` wrote, as untrusted input; ModelError if it is not that."""
        try:
            found = cls(**{**values, "context": tuple(values["context"])})
            numbers = (
                *found.context,
                found.reach_px,
                found.alignment_px,
                found.margin_px,
                found.least_input_px,
                found.input_step_px,
            )
            sound = (
                found.kind in ("local", "global", "never")
                and isinstance(found.reason, str)
                and len(found.reason) <= 2000
                and len(found.context) == 4
                and all(type(number) is int and 0 <= number <= 1 << 20 for number in numbers)
                and min(found.alignment_px, found.least_input_px, found.input_step_px) >= 1
            )
        except (KeyError, TypeError) as error:
            raise ModelError(f"a recorded locality cannot be read: {error}") from error
        if not sound:
            raise ModelError(f"a recorded locality cannot be believed: {str(values)[:200]}")
        return found


def check_halo(declared_px: int, locality: Locality, *, name: str = "the network") -> int:
    """Return the halo to use: the declared one, or the needed one where that is too small.

    A correction warns with both numbers. Whoever declares a halo seldom says how tiles must be
    aligned, so it is held against the reach of tiles cut anywhere.
    """
    if declared_px >= locality.reach_px:
        return declared_px
    halo_px = round_up(locality.reach_px, locality.alignment_px)
    warnings.warn(
        f"{name} declares a halo of {declared_px} px but an output pixel depends on "
        f"{locality.reach_px} px around it; using {halo_px} px",
        UserWarning,
        stacklevel=2,
    )
    return halo_px


@cache
def recorded_localities() -> dict[str, Locality]:
    """Return the localities of the registered architectures with their default options.

    They were measured by the probe; ``test_models_probe.py`` measures them again.
    """
    values = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Locality.from_json(entry) for name, entry in values.items()}
