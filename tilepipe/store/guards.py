"""Zarr stores between zarr and the files: what may be read, and what a write looks at first."""

from __future__ import annotations

import asyncio

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from tilepipe.blosc import HEADER_BYTES, frame_bytes
from tilepipe.errors import StoreError
from tilepipe.store.files import Files, LocalFiles

_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class CheckedReads(WrapperStore[ZarrStore]):
    """A zarr store in which objects that are empty or cut off are errors.

    zarr itself reads an empty one as fill value, and Blosc decodes what lies in memory behind a
    frame that was cut off.
    """

    _supports_sync_io = False
    """Newer zarr would otherwise call the wrapped store's own synchronous methods, past ``get``."""

    def __init__(self, store: ZarrStore, location: str) -> None:
        super().__init__(store)
        self.location = location
        self.blosc = False
        """Whether objects other than metadata are Blosc frames."""

    def _with_store(self, store: ZarrStore) -> CheckedReads:
        other = type(self)(store, self.location)
        other.blosc = self.blosc
        return other

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of ``key``; StoreError if there are none in it, or not all."""
        found = await self._store.get(key, prototype, byte_range)
        if found is not None and len(found) == 0:
            raise StoreError(f"{self.location}: {key} is an empty file")
        is_chunk = byte_range is None and key.rsplit("/", 1)[-1] not in _METADATA
        if self.blosc and is_chunk and found is not None:
            self._check_frame(key, found)
        return found

    def _check_frame(self, key: str, found: Buffer) -> None:
        wanted = frame_bytes(found[:HEADER_BYTES].to_bytes())
        if len(found) < wanted:
            raise StoreError(
                f"{self.location}: {key} was cut off, it has {len(found)} of {wanted} bytes"
            )


class WholeWrites(WrapperStore[ZarrStore]):
    """A zarr store in which no chunk or shard seems to exist, so that each write is a whole one.

    zarr reads the old shard before each write of it, even where all of it is replaced: a wasted
    read, and an error when the old shard is damaged. With one writer per unit the old bytes are
    never wanted (test_store_level.py::test_writing_a_unit_reads_nothing).
    """

    _supports_sync_io = False

    def __init__(self, store: ZarrStore, files: Files) -> None:
        super().__init__(store)
        self.files = files

    def _with_store(self, store: ZarrStore) -> WholeWrites:
        return type(self)(store, self.files)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return metadata only."""
        if key.rsplit("/", 1)[-1] in _METADATA:
            return await self._store.get(key, prototype, byte_range)
        return None

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object; on a local disk it has reached the disk when this returns."""
        if isinstance(self.files, LocalFiles):
            buffer = value.as_buffer_like()
            await asyncio.to_thread(self.files.put, key, buffer, durable=True)
        else:
            await self._store.set(key, value)
