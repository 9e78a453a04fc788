"""``Source``: what is to be segmented, and at which level."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilepipe.errors import PlanError
from tilepipe.pipeline.output import is_remote
from tilepipe.pipeline.stored import StoredImage, check_whole
from tilepipe.slide import Slide, open_slide
from tilepipe.slide.pixels import exact_dtype
from tilepipe.slide.tissue import Image
from tilepipe.spec import JobSpec, at_home, resolved
from tilepipe.store import Store, open_files, open_store, overlap, what_is_at
from tilepipe.tiling import Shape
from tilepipe.tiling.grid import level_extents


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be segmented, before anything is planned."""

    slide: Slide | None
    store: Store | None
    """An existing OME-Zarr that is segmented without being copied."""
    output: str
    given_mpp: float | None = None
    """``--slide-mpp``: µm per level-0 px instead of what the image says."""
    notes: tuple[str, ...] = ()
    """What becomes of the pixels."""

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
        if self.given_mpp is not None:
            return self.given_mpp, self.given_mpp
        return self.store.mpp if self.store is not None else self._slide.mpp

    def downsample(self, level: int) -> int:
        """Level-0 px per px of a level: what another program's store says, else a power of 2.

        Raises StoreError where that is no whole number.
        """
        return self.store.level_downsample(level) if self.store is not None else 1 << level

    def mpp_of(self, level: int) -> tuple[float, float]:
        """Return the µm/px (y, x) of a level of an image whose own are known."""
        assert self.mpp is not None
        y, x = self.mpp
        return y * self.downsample(level), x * self.downsample(level)

    def is_whole(self, level: int) -> bool:
        """Tell whether a level is the finest one made smaller by a whole number."""
        return self.store is None or not self.store.has_image or self.store.image(level).whole

    @property
    def image(self) -> Image:
        """The image, for who looks for tissue in it."""
        return StoredImage(self.store) if self.store is not None else self._slide

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

    def close(self) -> None:
        """Close the input's file: of a thousand slides that are refused none stays open."""
        if self.slide is not None:
            self.slide.close()


def open_source(slide: str, output: str | None, spec: JobSpec) -> Source:
    """Open the input; an OME-Zarr without another output is segmented in place.

    Raises SlideError or StoreError for what cannot be read as it is, an image of ours that is not
    all there among it; PlanError where the output would lie around or inside the input.
    """
    if not slide.strip():
        raise PlanError(f"slide {slide!r}: names no file; give the slide's path")
    if output is not None and not output.strip():
        raise PlanError(
            f"output {output!r}: names no place; leave it out for {default_output(slide)} in the "
            "current folder"
        )
    slide = at_home(slide)
    output = at_home(output) if output is not None else None
    alone = output is None or _same(slide, output)
    if not alone and overlap(slide, str(output)):
        raise PlanError(
            f"{output}: lies around or inside the input {slide}, which it could damage; choose "
            "another -o"
        )
    found = what_is_at(open_files(slide)) if alone or not is_remote(slide) else "other"
    if found == "ours":
        check_whole(open_store(slide))
    if alone and found in ("ours", "ome-zarr"):
        store = open_store(slide, writable=True)
        notes: list[str] = []
        exact_dtype(slide, store.dtype, store.dtype.itemsize * 8, notes)
        return Source(None, store, slide, given_mpp=spec.slide_mpp, notes=tuple(notes))
    opened = open_slide(
        slide, mpp=spec.slide_mpp, max_pixels=spec.max_pixels, on_damage=spec.on_damage
    )
    return Source(opened, None, output or default_output(slide), notes=opened.notes)


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
    return resolved(one) == resolved(other)


def resolve_level(source: Source, spec: JobSpec) -> int:
    """Return the image level to segment, from ``--level`` or ``--mpp``; PlanError lists them."""
    extents, mpp = source.extents, source.mpp
    # A level that is smaller by 1.5, say, is none that a mask can be laid over.
    whole = [k for k in range(len(extents)) if source.is_whole(k)]
    mpps = {k: source.mpp_of(k) for k in whole} if mpp is not None else {}
    listed = "; ".join(
        f"level {k}: {height} x {width} px"
        + (f", {told_mpp(mpps[k])} µm/px" if k in mpps else "")
        + ("" if k in whole else ", not smaller by a whole number")
        for k, (height, width) in enumerate(extents)
    )
    if spec.level is not None and spec.mpp is not None:
        raise PlanError("--level and --mpp both say where to segment; give one of them")
    if spec.level is not None:
        if spec.level >= len(extents):
            raise PlanError(f"there is no level {spec.level}; the pyramid has {listed}")
        source.downsample(spec.level)
        return spec.level
    if spec.mpp is None:
        return 0
    if not mpps:
        raise PlanError(
            f"--mpp {spec.mpp} needs the pixel size of the slide, which its tags do not say; "
            "pass --slide-mpp, e.g. --slide-mpp 0.25, or choose with --level"
        )
    off = {k: max(abs(side / spec.mpp - 1) for side in here) for k, here in mpps.items()}
    best = min(off, key=lambda k: off[k])
    if off[best] > 0.1:
        raise PlanError(f"no level is within 10 % of --mpp {spec.mpp}; the pyramid has {listed}")
    return best


def told_mpp(mpp: tuple[float, float]) -> str:
    """Return µm/px (y, x) as people read them: one number, or x and y where they differ."""
    y, x = (f"{side:.4g}" for side in mpp)
    return x if x == y else f"{x} x {y}"


def absolute(location: str) -> str:
    """Return a location that means the same in any folder."""
    return location if is_remote(location) else str(Path(location).absolute())


def portable(spec: JobSpec) -> JobSpec:
    """Make the paths in the settings absolute: they may be used in another folder."""
    changes: dict[str, Any] = {}
    if spec.weights is not None and not spec.weights.startswith("random:"):
        changes["weights"] = str(Path(spec.weights).absolute())
    if Path(spec.model).is_file():
        changes["model"] = str(Path(spec.model).absolute())
    if spec.tissue not in ("off", "auto"):
        changes["tissue"] = str(Path(spec.tissue).absolute())
    return spec.replace(**changes) if changes else spec
