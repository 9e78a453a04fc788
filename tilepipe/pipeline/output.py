"""The output of a job: created, taken up again, or refused with the reason and the ways out."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tilepipe.errors import MismatchError, StoreError
from tilepipe.packages import version_of
from tilepipe.pipeline.job import fingerprint
from tilepipe.slide import Slide
from tilepipe.spec import JobSpec, resolved
from tilepipe.store import Store, create_store, open_files, open_store, what_is_at
from tilepipe.tiling import round_up

T = TypeVar("T")
DEFAULT_UNIT_PX = 2048
LARGE_UNIT_PX = 4096
LARGE_SLIDE_PX = 32768
"""A shard of 2048² RGB px is 12 MB before compression: quick to write whole, cheap to redo."""


def is_remote(location: str) -> bool:
    """Tell whether a location is a URL."""
    return "://" in location


@contextmanager
def exclusive(location: str, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold an output for this process; StoreError if another tilepipe here has it.

    ``wait`` waits for the other one instead (parts that start together). The lock is the
    kernel's: it is gone with the process, however it ends. It holds on this machine alone
    (``leased`` is for several); two machines that run one job into one store do the same work
    twice, to the same bytes.
    """

    def lock(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise StoreError(
                f"{location}: another tilepipe process is writing {what} there; wait for it, "
                "or stop it"
            ) from None

    with _locked(location, what, lock):
        yield


@contextmanager
def running(location: str, label: str | None = None) -> Iterator[bool]:
    """Be one of the processes that write an output; yields whether it is the only one here.

    The only one may remove what killed writers left: nobody else's file is in the making.
    ``label``: one of those that write this label, of which each may do a part.
    """

    def lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sole = True
        except BlockingIOError:
            sole = False
        fcntl.flock(handle, fcntl.LOCK_SH)
        return sole

    with _locked(location, "running" if label is None else f"running {label}", lock) as sole:
        yield sole


@contextmanager
def _locked(location: str, what: str, lock: Callable[[int], T]) -> Iterator[T]:
    """Lock a file of this machine by ``lock``, whose answer is yielded.

    The file goes with its last lock: of every output that was ever written one would stay.
    """
    local = location.removeprefix("file://")
    place = location.rstrip("/") if is_remote(local) else str(resolved(local))
    name = hashlib.sha256(os.fsencode(f"{place}|{what}")).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"tilepipe-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}.lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            told = lock(handle)
            if _is_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever had it took the file away meanwhile
    try:
        yield told
    finally:
        with suppress(OSError):  # another process has a lock on it, too
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Image:
    """The image part of an output."""

    store: Store
    fingerprint: str
    unit_px: int
    complete: bool
    """Nothing of the image is left to be made here."""


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    names = ("tilepipe", "torch", "zarr", "numcodecs", "tifffile", "imagecodecs", "dask")
    return {name: version_of(name) for name in names}


def unit_for(slide: Slide, output: str, spec: JobSpec, *, device: str) -> int:
    """Return the side of a write unit: as asked, or as the image has it that is there already.

    Else 2048 px, less for an image that is smaller, and 4096 where a GPU meets a large one: a unit
    costs the scheduler the same, however large, and there they come quickly.
    """
    if spec.unit is not None:
        return spec.unit
    kept = None
    if what_is_at(open_files(output)) == "ours":
        with suppress(StoreError):  # one that is damaged is told when it is opened
            kept = open_store(output).read_record().get("unit_px")
    if isinstance(kept, int) and kept > 0:
        return kept
    side_px = max(slide.levels[0].shape)
    if device.startswith("cuda") and side_px >= LARGE_SLIDE_PX:
        return LARGE_UNIT_PX
    return min(DEFAULT_UNIT_PX, round_up(side_px, 512))


def open_image(
    slide: Slide,
    output: str,
    spec: JobSpec,
    *,
    device: str,
    overwrite: bool,
    sole: bool,
    check_turn: Callable[[], None],
) -> Image:
    """Create the store of a slide, or take up the one that is there.

    ``device`` is what will compute masks, ``sole`` whether no other process works there;
    ``check_turn`` raises StoreError where another machine has come to create it. Raises
    MismatchError if the store there was made from another input or other settings, StoreError if
    one that others work at would be overwritten.
    """
    found: Store | None = None
    record: dict[str, Any] = {}
    if what_is_at(open_files(output)) == "ours":
        try:
            found = open_store(output, writable=True)
            record = found.read_record()
        except StoreError:
            if not overwrite:
                raise
    unit_px = unit_for(slide, output, spec, device=device)
    source = slide.fingerprint()
    wanted = {
        "input": source,
        "unit_px": unit_px,
        "ome_zarr": spec.ome_zarr,
        "on_damage": spec.on_damage,
        "mpp": slide.mpp,
        "in_place": spec.in_place,
    }
    mark = fingerprint(**wanted)
    if found is not None and record.get("fingerprint") == mark:
        return Image(found, mark, unit_px, record.get("state") == "done" or spec.in_place)
    if found is not None and not record and found.own and is_blank(found):
        # Stopped between the creation and the first record: nothing is in it, it begins anew
        # (test_faults_writes.py).
        overwrite = True
    if found is not None and not overwrite:
        raise MismatchError(f"{output}: {_difference(record, wanted)}; {_WAYS_OUT_IMAGE}")
    if found is not None and not sole:
        raise StoreError(
            f"{output}: another tilepipe process is writing there, and --overwrite would take its "
            "store away; wait for it or stop it, then give the command again"
        )
    level0 = slide.levels[0]
    check_turn()
    store = create_store(
        output,
        channels=slide.channels,
        dtype=slide.dtype,
        extent=level0.shape,
        mpp=slide.mpp,
        channel_names=slide.channel_names,
        channel_colors=slide.channel_colors,
        rgb=slide.rgb,
        ome_zarr=spec.ome_zarr,
        unit_px=unit_px,
        with_image=not spec.in_place,
        overwrite=overwrite,
    )
    store.write_record(
        {
            **wanted,
            "fingerprint": mark,
            "source": {"path": str(Path(slide.path).absolute()), "format": slide.format},
            "mpp_source": slide.mpp_source,
            "notes": list(slide.notes),
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "state": "running",
        }
    )
    return Image(store, mark, unit_px, spec.in_place)


def is_blank(store: Store) -> bool:
    """Tell whether nothing was ever written to a store: no pixels, no labels, no journal."""
    return not (_lies_in(store, "0") or _lies_in(store, "tilepipe/journal") or store.labels)


def is_begun(store: Store, name: str) -> bool:
    """Tell whether a label of ours was created and nothing was ever written to it."""
    label = store.label(name)
    return (
        label.own
        and not label.read_record()
        and not _lies_in(store, f"labels/{name}/0")
        and not _lies_in(store, f"tilepipe/journal/{name}")
    )


def _lies_in(store: Store, folder: str) -> bool:
    return any(entry.is_folder for entry in store.files.entries(folder))


_WAYS_OUT_IMAGE = "choose another -o, or make it anew with --overwrite"


def _difference(record: dict[str, Any], wanted: dict[str, Any]) -> str:
    if not record:
        return "an OME-Zarr that tilepipe did not make from this slide stands there"
    before, now = record.get("input"), wanted["input"]
    before = before if isinstance(before, dict) else {}
    changed = sorted(key for key in now if before.get(key) != now[key])
    if changed:
        return f"was made from another input ({', '.join(changed)} differ)"
    settings = sorted(
        key for key in wanted
        if key != "input" and _plain(record.get(key)) != _plain(wanted[key])
    )  # fmt: skip
    told = ", ".join(f"{key} {record.get(key)} then, {wanted[key]} now" for key in settings)
    return f"was made with other settings ({told or 'its record is damaged'})"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
