"""``Level``: one array of a pyramid, read by boxes and written by whole units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStore

from tilepipe.blosc import is_blosc
from tilepipe.buffers import empty
from tilepipe.errors import MismatchError, StoreError, TilepipeError
from tilepipe.replaced import is_another, mark_of
from tilepipe.store.explain import explained, reason_of
from tilepipe.store.files import Files, LocalFiles
from tilepipe.store.guards import CheckedReads, WholeWrites
from tilepipe.store.recent import RecentUnits
from tilepipe.store.shard import ShardFormat, pieces
from tilepipe.tiling import Box, Grid, Shape, Unit

_MOST_CHUNK_BYTES = 2 << 30
_MOST_CHUNKS_IN_SHARD = 1 << 22
_MOST_CHANNELS = 4096


def checksum_of(pixels: NDArray[Any]) -> str:
    """Return XXH3 (64 bits, 16 hex digits) of the pixels' bytes in C order, little-endian.

    It is there to find damage, not forgery, and runs at the speed of memory: SHA-256 took 8 % of
    what the lanes do for a slide, more on a processor without instructions for it.
    """
    plain = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return xxhash.xxh3_64_hexdigest(plain.data)


@lru_cache(maxsize=64)
def _zeros_checksum(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return checksum_of(np.zeros(shape, dtype))


class Level:
    """One level: images read as (c, y, x), labels as (y, x)."""

    def __init__(
        self,
        files: Files,
        key: str,
        *,
        index: int,
        downsample: int,
        axes: Sequence[str],
        is_label: bool,
        unit_px: int | None,
        writable: bool,
        recent: RecentUnits | None = None,
    ) -> None:
        self.key = key
        """Place of the array in the store."""
        self.index = index
        """Place in its own pyramid; 0 is finest."""
        self.downsample = downsample
        """Level-0 px of the image per px, a side; the nearest number where it is not ``whole``."""
        self.whole = True
        """Whether that is so: of another program's level it need not be."""
        self._files = files
        self._axes = tuple(axes)
        self._is_label = is_label
        self._writable = writable
        self._recent = recent
        self._target: zarr.Array[Any] | None = None
        files.check_inside(key)
        self._folder = files.path(key) if isinstance(files, LocalFiles) else None
        self._mark = mark_of(self._folder) if self._folder is not None else None
        reads = CheckedReads(files.zarr_store(read_only=True), files.location)
        self._array = self._open(reads, mode="r")
        reads.blosc = is_blosc(self._array)
        if self._array.ndim != len(self._axes):
            raise StoreError(
                f"{files.location}: array {key} has {self._array.ndim} axes, its metadata says "
                f"{len(self._axes)}"
            )
        sizes = dict(zip(self._axes, self._array.shape, strict=True))
        self.shape: Shape = (sizes["y"], sizes["x"])
        if min(self._array.shape) < 1:
            raise StoreError(f"{files.location}: array {key} is empty: {self._array.shape}")
        self.channels: int = sizes.get("c", 1)
        if any(sizes[axis] != 1 for axis in sizes if axis in "tz" or (is_label and axis == "c")):
            raise StoreError(
                f"{files.location}: array {key} has the size {sizes}; only one plane of one time "
                "point can be read: take that plane out into its own image first"
            )
        self.dtype: np.dtype[Any] = self._array.dtype.newbyteorder("=")
        shard = self._array.shards or self._array.chunks
        self._check_chunks(self._array.chunks, shard)
        self.unit_px: int = unit_px or max(shard[-2:])
        format_ = ShardFormat.for_array(self._array)
        is_own = format_ is not None and format_.shard[-2:] == (self.unit_px, self.unit_px)
        self._packs = format_ if is_own else None
        # zarr asks a remote store for many chunks at once; a local one answers a lane by itself.
        self._unpacks = format_ if isinstance(files, LocalFiles) else None

    def _check_chunks(self, chunk: tuple[int, ...], shard: tuple[int, ...]) -> None:
        """Refuse what would take absurd memory to read one pixel of, and what is no image."""
        if self.dtype.kind not in ("iu" if self._is_label else "iuf"):
            raise StoreError(
                f"{self._files.location}: array {self.key} holds {self.dtype}, not the pixels of "
                f"{'a label' if self._is_label else 'an image'}"
            )
        if self.channels > _MOST_CHANNELS:
            raise StoreError(
                f"{self._files.location}: array {self.key} has {self.channels} channels; the "
                f"limit is {_MOST_CHANNELS}"
            )
        if prod(chunk) * self.dtype.itemsize > _MOST_CHUNK_BYTES or min(chunk) < 1:
            raise StoreError(
                f"{self._files.location}: array {self.key} has chunks of {chunk} {self.dtype}; "
                f"the limit is {_MOST_CHUNK_BYTES >> 30} GiB: write it anew in smaller chunks"
            )
        if prod(shard) // prod(chunk) > _MOST_CHUNKS_IN_SHARD:
            raise StoreError(
                f"{self._files.location}: array {self.key} has shards of {shard} in chunks of "
                f"{chunk}; the limit is {_MOST_CHUNKS_IN_SHARD} chunks a shard"
            )

    def _open(self, store: ZarrStore, *, mode: Any) -> zarr.Array[Any]:
        with explained(self._files.location, f"open array {self.key}"):
            try:
                return zarr.open_array(store, path=self.key, mode=mode)
            except (TilepipeError, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise StoreError(
                        f"{self._files.location}: array {self.key} is missing; the store is "
                        "incomplete, run the job again with --overwrite"
                    ) from error
                raise
            except Exception as error:
                raise StoreError(
                    f"{self._files.location}: array {self.key} cannot be opened: {reason_of(error)}"
                ) from error

    @property
    def lead(self) -> tuple[int, ...]:
        """Sides of the axes before (y, x): (channels,) of an image, none of a label."""
        return () if self._is_label else (self.channels,)

    @property
    def piece_bytes(self) -> int:
        """Decoded bytes of what a read can only decode whole: the chunks of all channels."""
        chunks = self._array.chunks
        beside = -(-self.channels // chunks[self._axes.index("c")]) if "c" in self._axes else 1
        return prod(chunks) * self.dtype.itemsize * beside

    @property
    def grid(self) -> Grid:
        """The write units of this level."""
        return Grid(self.shape, self.unit_px)

    def _selection(self, box: Box) -> tuple[int | slice, ...]:
        spans = {"y": slice(box.y0, box.y1), "x": slice(box.x0, box.x1)}
        leading: int | slice = 0 if self._is_label else slice(None)
        return tuple(spans.get(axis, leading if axis == "c" else 0) for axis in self._axes)

    def read(self, box: Box) -> NDArray[Any]:
        """Return the pixels of ``box``, (c, y, x) of an image, (y, x) of a label.

        The array may be shared with other readers: do not change it. Raises StoreError, naming
        array and box, for a box outside the level and for damage; MismatchError where another
        process has begun the array anew since it was opened (on a local disk).
        """
        if not Box.of_shape(self.shape).contains(box) or box.area == 0:
            raise StoreError(
                f"{self._files.location}: {box} of array {self.key}, which is "
                f"{self.shape[0]} x {self.shape[1]} px (y, x)"
            )
        if self._recent is None:
            return self._stored(box)
        held = {unit: self._recent.get(self._place(unit)) for unit in self.grid.touching(box)}
        if all(pixels is None for pixels in held.values()):
            return self._stored(box)
        whole = empty((*self.lead, *box.shape), self.dtype)
        for unit, pixels in held.items():
            part = unit.box.intersect(box)
            if pixels is None:
                found = self._stored(part)
            else:
                found = pixels[(..., *part.shift(-unit.box.y0, -unit.box.x0).slices)]
            if part == box:
                return found
            whole[(..., *part.shift(-box.y0, -box.x0).slices)] = found
        return whole

    def _place(self, unit: Unit) -> tuple[str, int, int]:
        return self.key, unit.iy, unit.ix

    def _stored(self, box: Box) -> NDArray[Any]:
        """Read a box inside the level from the store itself."""
        try:
            if self._unpacks is not None:
                pixels = self._read_shards(self._unpacks, box)
            else:
                pixels = np.asarray(self._array[self._selection(box)])
        except MemoryError:
            raise
        except Exception as error:
            self._check_same()
            reason = reason_of(error).removeprefix(f"{self._files.location}: ")
            raise StoreError(
                f"{self._files.location}: array {self.key} cannot be read at {box}: {reason}; "
                "the data there is damaged or out of reach: restore it, or write the store anew "
                "with --overwrite"
            ) from error
        self._check_same()
        if pixels.dtype != self.dtype:
            pixels = pixels.astype(self.dtype)
        return pixels if self._is_label or pixels.ndim == 3 else pixels[np.newaxis]

    def _check_same(self) -> None:
        """Raise MismatchError if what was just read may be of another array, or of none."""
        if self._folder is not None and is_another(mark_of(self._folder), self._mark):
            raise MismatchError(
                f"{self._files.location}: array {self.key} was begun anew by another process, or "
                "taken away, while it was read; give the command again when that is done"
            )

    def write_unit(self, unit: Unit, pixels: NDArray[Any]) -> str:
        """Write a whole unit, (c, y, x) or (y, x) of ``unit.box``; return its checksum.

        When this returns the pixels are on the disk. A unit has one writer; writing it again
        replaces it. A unit that is all 0 is not stored. The caller gives ``pixels`` away: they
        may be shown to later readers.

        Raises StoreError if the pixels do not fit the unit or cannot be written.
        """
        location = self._files.location
        if not self._writable:
            raise StoreError(f"{location}: opened for reading; open it with writable=True")
        if unit != self.grid.unit(unit.iy, unit.ix):
            raise StoreError(f"{location}: {unit} is not a unit of array {self.key}")
        if pixels.shape != (*self.lead, *unit.box.shape) or pixels.dtype != self.dtype:
            raise StoreError(
                f"{location}: unit ({unit.iy}, {unit.ix}) of array {self.key} takes "
                f"{(*self.lead, *unit.box.shape)} {self.dtype}, got {pixels.shape} {pixels.dtype}"
            )
        if self._recent is not None:
            self._recent.drop(self._place(unit))
        try:
            if self._packs is not None:
                self._write_shard(self._packs, unit, pixels)
            else:
                self._write_by_zarr(unit, pixels)
        except (TilepipeError, MemoryError):
            raise
        except OSError:
            with explained(location, f"write array {self.key} at {unit.box}"):
                raise
        except Exception as error:
            raise StoreError(
                f"{location}: array {self.key} cannot be written at {unit.box}: "
                f"{reason_of(error)}; "
                "run the same command again, what is done is kept"
            ) from error
        if self._recent is not None:
            self._recent.put(self._place(unit), pixels)
        return checksum_of(pixels)

    def _write_shard(self, format_: ShardFormat, unit: Unit, pixels: NDArray[Any]) -> None:
        key = self._shard_key(unit.iy, unit.ix)
        lead = self._array.shape[:-2]
        parts = format_.pack(pixels.reshape((*lead, *pixels.shape[-2:])))
        first = next(parts, None)
        if first is None:
            self._files.delete(key)
        else:
            self._files.put(key, chain([first], parts), durable=True)

    def _read_shards(self, format_: ShardFormat, box: Box) -> NDArray[Any]:
        """Read a box shard by shard; what is not stored is 0."""
        assert isinstance(self._files, LocalFiles)
        lead = self._array.shape[:-2]
        pixels = empty((*lead, *box.shape), self.dtype)
        for place, part, target in pieces(box, format_.shard[-2:], pixels):
            with self._files.opened(self._shard_key(*place)) as shard:
                if shard is None:
                    target[...] = 0
                else:
                    format_.unpack(shard.read, shard.size_bytes, part, target)
        return pixels.reshape((*self.lead, *box.shape))

    def _shard_key(self, iy: int, ix: int) -> str:
        coordinates = (*(0 for _ in self._array.shape[:-2]), iy, ix)
        return f"{self.key}/{self._array.metadata.encode_chunk_key(coordinates)}"

    def _write_by_zarr(self, unit: Unit, pixels: NDArray[Any]) -> None:
        """Write what is not laid out in shards: OME-Zarr 0.4, a file a chunk."""
        if self._target is None:
            store = WholeWrites(self._files.zarr_store(read_only=False), self._files)
            self._target = self._open(store, mode="r+")
        # zarr looks for empty chunks with a third of a write's time; whole units are enough.
        # Bytes are looked at: -0.0 is no 0.
        any_byte = bool(np.ascontiguousarray(pixels).view(np.uint8).any())
        target: Any = self._target.with_config({"write_empty_chunks": any_byte})
        target[self._selection(unit.box)] = (
            pixels if self._is_label or "c" in self._axes else pixels[0]
        )

    def not_stored(self) -> Iterator[Unit]:
        """Yield the units of which a file is not there: those that are all 0, and lost ones.

        Folders are listed; a hundred thousand units are not asked for one by one.
        """
        grid = self.grid
        high, wide = (self._array.shards or self._array.chunks)[-2:]
        absent: dict[tuple[int, int], None] = {}
        for row in range(-(-self.shape[0] // high)):
            folder = self._shard_key(row, 0).rpartition("/")[0]
            there = {entry.name for entry in self._files.entries(folder)}
            for column in range(-(-self.shape[1] // wide)):
                if self._shard_key(row, column).rpartition("/")[2] not in there:
                    absent[row * high // self.unit_px, column * wide // self.unit_px] = None
        yield from (grid.unit(iy, ix) for iy, ix in absent)

    def checksum_of_zeros(self, unit: Unit) -> str:
        """Return the checksum that a unit has if it is all 0."""
        return _zeros_checksum((*self.lead, *unit.box.shape), self.dtype)

    def checksum(self, unit: Unit) -> str:
        """Read a unit back and return its checksum; StoreError if it is damaged.

        A missing shard reads as 0 and so has the checksum of an all-0 unit: compare with the
        journal's.
        """
        return checksum_of(self._stored(unit.box))
