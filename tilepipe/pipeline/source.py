"""``Source``: what is to be segmented, and at which level."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilepipe.errors import PlanError
from tilepipe.pipeline.output import is_remote
from tilepipe.slide import Slide, open_slide
from tilepipe.spec import JobSpec
from tilepipe.store import Store, open_files, open_store, what_is_at
from tilepipe.tiling import Shape
from tilepipe.tiling.grid import level_extents


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be segmented, before anything is planned."""

    slide: Slide | None
    store: Store | None
    """An existing OME-Zarr that is segmented without being copied."""
    output: str

    @property
    def name(self) -> str:
        """How the user knows it."""
        return self.slide.path if self.slide is not None else self.output

    @property
    def extents(self) -> tuple[Shape, ...]:
        """Extents of the pyramid's levels."""
        if self.store is not None:
            return tuple(self.store.image(k).shape for k in range(self.store.n_levels))
        assert self.slide is not None
        return level_extents(self.slide.levels[0].shape)

    @property
    def mpp(self) -> tuple[float, float] | None:
        """µm per level-0 px (y, x)."""
        return self.store.mpp if self.store is not None else self._slide.mpp

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return self.store.channels if self.store is not None else self._slide.channels

    @property
    def dtype(self) -> Any:
        """Dtype of the image."""
        return self.store.dtype if self.store is not None else self._slide.dtype

    @property
    def _slide(self) -> Slide:
        assert self.slide is not None
        return self.slide


def open_source(slide: str, output: str | None, spec: JobSpec) -> Source:
    """Open the input; an OME-Zarr without another output is segmented in place."""
    if (output is None or _same(slide, output)) and what_is_at(open_files(slide)) in (
        "ours",
        "ome-zarr",
    ):
        return Source(None, open_store(slide, writable=True), slide)
    opened = open_slide(
        slide, mpp=spec.slide_mpp, max_pixels=spec.max_pixels, on_damage=spec.on_damage
    )
    return Source(opened, None, output or default_output(slide))


def default_output(slide: str) -> str:
    """``slide.ome.tif`` → ``slide.zarr`` in the current folder."""
    name = Path(slide.rstrip("/")).name
    for suffix in (".ome.tiff", ".ome.tif", ".ome.zarr"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] + ".zarr"
    return f"{Path(name).stem}.zarr"


def _same(one: str, other: str) -> bool:
    if is_remote(one) or is_remote(other):
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def resolve_level(
    extents: tuple[Shape, ...], mpp: tuple[float, float] | None, spec: JobSpec
) -> int:
    """Return the image level to segment, from ``--level`` or ``--mpp``; PlanError lists them."""
    listed = "; ".join(
        f"level {k}: {height} x {width} px"
        + (f", {mpp[0] * 2**k:.4g} µm/px" if mpp is not None else "")
        for k, (height, width) in enumerate(extents)
    )
    if spec.level is not None and spec.mpp is not None:
        raise PlanError("--level and --mpp both say where to segment; give one of them")
    if spec.level is not None:
        if spec.level >= len(extents):
            raise PlanError(f"there is no level {spec.level}; the pyramid has {listed}")
        return spec.level
    if spec.mpp is None:
        return 0
    if mpp is None:
        raise PlanError(
            f"--mpp {spec.mpp} needs the pixel size of the slide, which its tags do not say; "
            "pass --slide-mpp, e.g. --slide-mpp 0.25, or choose with --level"
        )
    best = min(range(len(extents)), key=lambda k: abs(mpp[0] * 2**k / spec.mpp - 1))
    if abs(mpp[0] * 2**best / spec.mpp - 1) > 0.1:
        raise PlanError(f"no level is within 10 % of --mpp {spec.mpp}; the pyramid has {listed}")
    return best
