"""``Files``: the few file operations a store needs beside zarr's, local or remote.

Keys are relative to the store's root, parts joined by ``/``. Every put is atomic: a reader sees the
old bytes or the new ones, never a mixture.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from tilepipe.errors import StoreError
from tilepipe.replaced import ARRAY_METADATA
from tilepipe.spec import at_home, resolved
from tilepipe.store.explain import explained
from tilepipe.store.partial import PARTIAL, is_abandoned, partial_of

_NODE_METADATA = (*ARRAY_METADATA, ".zgroup", ".zattrs")


@dataclass(frozen=True, slots=True)
class Entry:
    """One name directly under a folder."""

    name: str
    is_folder: bool
    size_bytes: int
    tag: str = ""
    """What a remote store calls the content of a file; another content has another."""


class Files(Protocol):
    """File operations under one root."""

    location: str

    def is_file(self) -> bool:
        """Tell whether at the location itself lies a file, not a folder."""

    def get(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """Return the bytes of ``key``, None if there is none; StoreError above the limit."""

    def get_many(self, keys: Iterable[str], *, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Yield the bytes of those ``keys`` that exist, cut off one byte above the limit."""

    def put(self, key: str, value: Any, *, durable: bool = False) -> None:
        """Write the buffer ``value``, or several one after the other as they come, at once.

        ``durable`` waits until it is on the disk.
        """

    def claim(self, key: str, value: bytes) -> bool:
        """Write ``key`` unless it is there; of several who try at once one does. Tell whether."""

    def delete(self, key: str) -> None:
        """Remove ``key`` if it is there."""

    def delete_root(self) -> None:
        """Remove the root if nothing is left in it."""

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield what lies directly under ``folder``; nothing if there is no such folder."""

    def delete_tree(self, folder: str, *, keep: Collection[str] = ()) -> None:
        """Remove all under ``folder`` ("" is the root itself) but the top names ``keep``."""

    def clean_partial(self) -> int:
        """Remove what killed writers left; return how many files that were."""

    def check_inside(self, key: str) -> None:
        """Raise StoreError if ``key`` leads out of the root, by its name or by a link."""

    def zarr_store(self, *, read_only: bool) -> ZarrStore:
        """Return zarr's view of the root."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that is read in parts; what replaces it meanwhile is not seen."""

    handle: int
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``, fewer at the file's end."""
        parts = []
        while length > 0 and (part := os.pread(self.handle, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def open_files(location: str, *, of_stores: bool = False) -> Files:
    """Return the files at a local path or an ``s3://bucket/key``; nothing is touched.

    ``of_stores``: of a folder that stores lie in, on S3 maybe the bucket itself. A store is never
    all of a bucket, which ``overwrite`` would empty.
    """
    if location.startswith("s3://"):
        from tilepipe.store.remote import RemoteFiles

        return RemoteFiles(location, whole_bucket=of_stores)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location):
        if match[1] != "file":
            raise StoreError(
                f"{location}: stores are local paths or s3://bucket/key, not {match[1]}://"
            )
        location = location.removeprefix("file://")
    return LocalFiles(location)


def overlap(one: str, other: str) -> bool:
    """Tell whether one location is the other or lies inside it, however they are spelled."""
    if "://" in one.removeprefix("file://") or "://" in other.removeprefix("file://"):
        a, b = (location.rstrip("/") + "/" for location in (one, other))
        return a.startswith(b) or b.startswith(a)
    roots = [resolved(at_home(each.removeprefix("file://"))) for each in (one, other)]
    return roots[0].is_relative_to(roots[1]) or roots[1].is_relative_to(roots[0])


def check_key(location: str, key: str) -> None:
    """Raise StoreError for a key that is not plain names joined by ``/``."""
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise StoreError(f"{location}: {key[:200]!r} is not a name inside a store")


class LocalFiles:
    """Files of a local folder. Links that lead out of the folder are refused."""

    def __init__(self, location: str) -> None:
        self.location = location
        # Absolute, so that a worker started elsewhere writes to the same place.
        self.root = Path(at_home(location)).absolute()
        self._inside: set[Path] = set()

    def path(self, key: str) -> Path:
        """Return where ``key`` lies; StoreError if that is not inside the root."""
        if not key:
            return self.root
        check_key(self.location, key)
        path = self.root / key
        folder = path.parent
        if folder not in self._inside:
            root = resolved(self.root)
            if not resolved(folder).is_relative_to(root):
                raise StoreError(
                    f"{self.location}: {key} lies behind a link that leaves the store; "
                    "remove the link"
                )
            if folder.exists():
                self._inside.add(folder)
        return path

    def is_file(self) -> bool:
        """Tell whether at the location itself lies a file, not a folder."""
        return self.root.exists() and not self.root.is_dir()

    def check_inside(self, key: str) -> None:
        """Raise StoreError if ``key`` itself leads out of the root."""
        path = self.path(key)
        if not resolved(path).is_relative_to(resolved(self.root)):
            raise StoreError(
                f"{self.location}: {key} is a link that leaves the store; remove the link"
            )

    def get(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """Return the bytes of ``key``, None if there is none; StoreError above the limit."""
        path = self.path(key)
        with explained(self.location, f"read {key}"):
            try:
                value = _read_plain(path, limit_bytes)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        if limit_bytes is not None and len(value) > limit_bytes:
            raise StoreError(f"{self.location}: {key} is larger than {limit_bytes} bytes")
        return value

    @contextmanager
    def opened(self, key: str) -> Iterator[OpenFile | None]:
        """Open ``key`` to read parts of it, None if there is none; StoreError if it is empty."""
        try:
            handle = os.open(self.path(key), os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        try:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
                what = "an empty" if stat.S_ISREG(facts.st_mode) else "not a plain"
                raise StoreError(f"{self.location}: {key} is {what} file")
            yield OpenFile(handle, facts.st_size)
        finally:
            os.close(handle)

    def get_many(self, keys: Iterable[str], *, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Yield the bytes of those ``keys`` that exist, cut off one byte above the limit."""
        for key in keys:
            try:
                yield key, _read_plain(self.path(key), limit_bytes)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    continue
                yield key, b""  # unreadable counts as not recorded, as a torn record does

    def put(self, key: str, value: Any, *, durable: bool = False) -> None:
        """Write a buffer or several at once; ``durable`` waits until it is on the disk."""
        path = self.path(key)
        with explained(self.location, f"write {key}"), partial_of(path) as partial:
            try:
                try:
                    stream = partial.open("wb")
                except FileNotFoundError:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stream = partial.open("wb")
                with stream:
                    stream.writelines(value if isinstance(value, Iterator) else [value])
                    if durable:
                        stream.flush()
                        os.fsync(stream.fileno())
                partial.replace(path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise

    def claim(self, key: str, value: bytes) -> bool:
        """Write ``key`` unless it is there; of several who try at once one does. Tell whether."""
        path = self.path(key)
        with explained(self.location, f"write {key}"):
            while True:
                try:
                    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    break
                except FileExistsError:
                    return False
                except FileNotFoundError:  # again, should it be taken away before the next try
                    path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(value)
            except BaseException:  # a full disk: it would look as if somebody had claimed it
                path.unlink(missing_ok=True)
                raise
        return True

    def delete_root(self) -> None:
        """Remove the folder if nothing is left in it."""
        with suppress(OSError):
            self.root.rmdir()

    def delete(self, key: str) -> None:
        """Remove ``key`` if it is there."""
        with explained(self.location, f"remove {key}"), suppress(NotADirectoryError):
            self.path(key).unlink(missing_ok=True)

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield what lies directly under ``folder``; links are left out."""
        path = self.path(folder)
        if folder:
            self.check_inside(folder)
        try:
            scan = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            with explained(self.location, f"list {folder or 'the folder'}"):
                raise error from error
        with scan:
            for found in scan:
                try:
                    facts = found.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process has just renamed or removed it
                    continue
                if not stat.S_ISLNK(facts.st_mode):
                    yield Entry(found.name, stat.S_ISDIR(facts.st_mode), facts.st_size)

    def delete_tree(self, folder: str, *, keep: Collection[str] = ()) -> None:
        """Remove all under ``folder`` but the top names ``keep``; links go, not their targets."""
        path = self.path(folder)
        self._inside.clear()
        with explained(self.location, f"remove {folder or 'the old store'}"):
            if not path.is_dir() or (folder and path.is_symlink()):
                if folder:
                    path.unlink(missing_ok=True)
                return
            _forget_arrays(path)
            for found in list(os.scandir(path)):
                if found.name in keep:
                    continue
                if found.is_dir(follow_symlinks=False):
                    shutil.rmtree(found.path)
                else:
                    Path(found.path).unlink(missing_ok=True)
            if folder and not keep:
                path.rmdir()

    def clean_partial(self) -> int:
        """Remove ``*.partial`` that no living process writes; return how many files that were."""
        count = 0
        with explained(self.location, "remove unfinished files"):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if name.endswith(PARTIAL) and is_abandoned(Path(folder, name)):
                        Path(folder, name).unlink(missing_ok=True)
                        count += 1
        return count

    def zarr_store(self, *, read_only: bool) -> ZarrStore:
        """Return zarr's view of the folder."""
        return LocalStore(self.root, read_only=read_only)


def _forget_arrays(folder: Path) -> None:
    """Remove the metadata of the arrays under a folder before their chunks go.

    Whoever reads one then knows that what is not there was not all 0 (``tilepipe.replaced``).
    """
    with os.scandir(folder) as scan:
        below = [Path(found.path) for found in scan if found.is_dir(follow_symlinks=False)]
    for one in below:
        if any((one / name).is_file() for name in _NODE_METADATA):
            _forget_arrays(one)
            for name in ARRAY_METADATA:
                (one / name).unlink(missing_ok=True)


def _read_plain(path: Path, limit_bytes: int | None) -> bytes:
    """Read a plain file without following a link in its last part."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return stream.read() if limit_bytes is None else stream.read(limit_bytes + 1)
