"""A job of a few units whose writes and reads fail on command."""

import errno
import io
import os
import pathlib
import threading

import numpy as np
import pytest
import tifffile

from tilepipe.pipeline.events import ignore
from tilepipe.pipeline.run import Request, run_one
from tilepipe.spec import JobSpec


class FailingFile(io.FileIO):
    """Takes half of what is written, then refuses."""

    def __init__(self, path, number):
        super().__init__(path, "wb")
        self._number = number

    def write(self, value):
        raw = bytes(value)
        super().write(raw[: len(raw) // 2])
        raise OSError(self._number, os.strerror(self._number))


class Faults:
    """Makes the k-th write of the store's files fail, at one of its four steps."""

    def __init__(self, patch):
        self.kind = ""
        self.k = -1
        self.lasting = False
        self.number = errno.EIO
        self.writes = 0
        self.injected = 0
        self._doomed = set()
        self._lock = threading.Lock()
        opened, replaced, synced = pathlib.Path.open, pathlib.Path.replace, os.fsync

        def open_(path, mode="r", *args, **kwargs):
            if mode != "wb" or not path.name.endswith(".partial"):
                return opened(path, mode, *args, **kwargs)
            # Without its folder it fails here and is tried again: that is no write yet.
            stream = opened(path, mode, *args, **kwargs)
            with self._lock:
                self.writes += 1
                hit = self.writes == self.k or (self.lasting and self.writes > self.k >= 0)
                self.injected += hit
            if hit and self.kind in ("open", "write"):
                stream.close()
                if self.kind == "write":
                    return FailingFile(path, self.number)
                path.unlink()
                raise OSError(self.number, os.strerror(self.number), str(path))
            if hit:
                self._doomed.add(str(path) if self.kind == "replace" else stream.fileno())
            return stream

        def replace(path, target):
            if str(path) in self._doomed:
                self._doomed.discard(str(path))
                raise OSError(self.number, os.strerror(self.number), str(path))
            return replaced(path, target)

        def fsync(handle):
            if handle in self._doomed:
                self._doomed.discard(handle)
                raise OSError(self.number, os.strerror(self.number))
            synced(handle)

        patch.setattr(pathlib.Path, "open", open_)
        patch.setattr(pathlib.Path, "replace", replace)
        patch.setattr(os, "fsync", fsync)

    def arm(self, kind, k, *, lasting, number):
        """Fail the k-th write from now on; ``lasting``: and all after it."""
        self.kind, self.k, self.lasting, self.number = kind, k, lasting, number
        self.writes = 0
        self.injected = 0
        self._doomed.clear()

    def disarm(self):
        """Let everything through again; return how many faults there were."""
        with self._lock:
            self.k, self.lasting = -1, False
            # Files that are never synced leave their numbers here, and the next file gets one.
            self._doomed.clear()
        return self.injected


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """An RGB TIFF of 150 x 130 px: four units of 128 px at each stage."""
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    pixels = np.random.default_rng(3).integers(0, 255, (150, 130, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", compression="deflate")
    return path


@pytest.fixture(scope="session")
def job():
    """Run the job on a slide into a store; raises as ``tilepipe run`` does."""

    def run(slide, store, *, on_event=ignore, **changes):
        spec = JobSpec(
            model="unet", weights="random:0", base=2, options={"depth": 1}, precision="fp32",
            backend="torch", device="cpu", tune=False, unit=128, **changes,
        )  # fmt: skip
        return run_one(Request(str(slide), str(store), spec), on_event=on_event)

    return run


def content(store):
    """Every file of a store but metadata: its place and its bytes."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(pathlib.Path(store).rglob("*"))
        if path.is_file() and path.name != "zarr.json" and "journal" not in path.parts
    }


@pytest.fixture(scope="session")
def reference(job, slide, tmp_path_factory):
    """What an undisturbed run writes."""
    store = tmp_path_factory.mktemp("reference") / "out.zarr"
    job(slide, store)
    found = content(store)
    assert len(found) >= 8
    return found


@pytest.fixture(scope="session")
def right(reference):
    """Assert that a store is what an undisturbed run writes, and says that it is done."""
    from tilepipe.store import open_store

    def check(store):
        assert content(store) == reference
        opened = open_store(str(store))
        assert opened.label("unet").read_record()["state"] == "done"
        assert opened.read_record()["state"] == "done"
        assert not list(pathlib.Path(store).rglob("*.partial"))

    return check


@pytest.fixture(scope="session")
def looks_done():
    """Tell whether a store claims that its mask is complete."""
    from tilepipe.errors import StoreError
    from tilepipe.store import open_store

    def claim(store):
        try:
            return open_store(str(store)).label("unet").read_record().get("state") == "done"
        except StoreError:
            return False

    return claim
