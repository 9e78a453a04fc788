"""Output files that appear whole or not at all."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tilepipe.errors import ExportError, TilepipeError
from tilepipe.store import Store, overlap

_NO_TEXT = "backslashreplace"
"""What becomes of the bytes of a file's name that are no text."""


def check_place(store: Store, path: Path) -> None:
    """Raise ExportError for a path inside the store, or that of the slide it was made from.

    Not even ``overwrite`` means those: of a slide named as its export would be, this is all there
    is.
    """
    if overlap(store.location, str(path)):
        raise ExportError(
            f"{path}: lies around or inside the store {store.location}, which it could damage; "
            "name another --output"
        )
    source = store.read_record().get("source")
    slide = source.get("path") if isinstance(source, dict) else None
    if isinstance(slide, str) and path.exists() and Path(slide).exists() and path.samefile(slide):
        raise ExportError(
            f"{path}: is the slide that {store.location} was made from; name another --output"
        )


@contextmanager
def whole_path(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the name only if all went well.

    Raises ExportError if ``path`` exists and ``overwrite`` is false, is a folder or a device, or
    cannot be written.
    """
    # A file would take the place of /dev/null, for all programs of the computer.
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: is there and no file; name another --output")
    if path.exists() and not overwrite:
        raise ExportError(f"{path}: exists already; pass --overwrite, or another --output")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: its folder {path.parent} does not exist; create it first")
    # Of its own: what two processes write to one name at once would be in one file.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield part
        part.replace(path)
    except TilepipeError:
        raise  # a StoreError is an OSError too, and tells what could not be read
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        # Where nothing can be written, nothing can be removed: that would be said in the place of
        # what went wrong, of a file that nobody asked for.
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def text_sink(path: Path, *, overwrite: bool = False) -> Iterator[IO[str]]:
    """Open a text file to write, gzipped when the name ends in ``.gz``; whole or not at all."""
    with whole_path(path, overwrite=overwrite) as part:
        if path.suffix == ".gz":
            # mtime 0: the same objects give the same bytes.
            with (
                part.open("wb") as raw,
                gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            ):
                yield _Encoder(packed)  # type: ignore[misc]
        else:
            with part.open("w", encoding="utf-8", errors=_NO_TEXT, newline="") as file:
                yield file


class _Encoder:
    """Just enough of a text file over a gzip stream."""

    def __init__(self, packed: gzip.GzipFile) -> None:
        self._packed = packed

    def write(self, text: str) -> int:
        self._packed.write(text.encode(errors=_NO_TEXT))
        return len(text)
