"""Zarr stores between zarr and the files: what may be read, and what a write looks at first."""

from __future__ import annotations

import asyncio

from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from tilepipe.errors import StoreError
from tilepipe.store.files import Files, LocalFiles

_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


class CheckedReads(WrapperStore[ZarrStore]):
    """A zarr store in which an empty object is an error; zarr itself reads it as fill value."""

    _supports_sync_io = False
    """Newer zarr would otherwise call the wrapped store's own synchronous methods, past ``get``."""

    def __init__(self, store: ZarrStore, location: str) -> None:
        super().__init__(store)
        self.location = location

    def _with_store(self, store: ZarrStore) -> CheckedReads:
        return type(self)(store, self.location)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of ``key``; StoreError if there are none in it."""
        found = await self._store.get(key, prototype, byte_range)
        if found is not None and len(found) == 0:
            raise StoreError(f"{self.location}: {key} is an empty file")
        return found


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
