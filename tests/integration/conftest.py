"""Tiny slides and real processes: `tilepipe`, `dask worker` and `dask scheduler`, forked warm."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

WAIT_S = 200.0
"""No assertion is about seconds; this only ends a hang."""

NETWORK = {"model": "unet", "weights": "random:0", "base": 2, "options": {"depth": 1}}
SETTINGS = {"precision": "fp32", "backend": "torch", "device": "cpu", "tune": False}


class Process:
    """A child of the zygote."""

    def __init__(self, zygote, pid, log):
        self._zygote = zygote
        self.pid = pid
        self.log = log
        self.code = None

    def poll(self):
        if self.code is None:
            self.code = self._zygote.ask({"wait": self.pid})["code"]
        return self.code

    def wait(self, timeout_s=WAIT_S):
        end_s = time.monotonic() + timeout_s
        while self.poll() is None:
            assert time.monotonic() < end_s, f"still running: {self.text()}"
            time.sleep(0.02)
        return self.code

    def send(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        return self.wait()

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Zygote:
    """Forks processes that have imported everything already."""

    def __init__(self, folder):
        self._folder = folder
        self._count = 0
        self._lock = threading.Lock()
        # Beside other processes, threads that wait for each other burn what the others need.
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        threads["OMP_THREAD_LIMIT"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "TILEPIPE_DASHBOARD": ""},
        )
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def ask(self, request):
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def start(self, command, *argv, env=None, cwd=None):
        self._count += 1
        log = self._folder / f"{self._count:03}-{command}.log"
        reply = self.ask(
            {
                "command": command,
                "argv": [str(arg) for arg in argv],
                "env": {key: str(value) for key, value in (env or {}).items()},
                "cwd": str(cwd or self._folder),
                "log": str(log),
            }
        )
        return Process(self, reply["pid"], log)

    def run(self, *argv, code=0, **options):
        """Run ``tilepipe`` to its end; return what it printed."""
        process = self.start("tilepipe", *argv, **options)
        assert process.wait() == code, process.text()
        return process.text()

    def close(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    found = Zygote(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()


def write_slide(path, *, shape=(600, 500), seed=0, tile=64):
    """Write noise over blobs: every unit of the mask differs from every other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    blobs = 100 + 60 * np.sin(y / 23 + seed) * np.cos(x / 31)
    pixels = (blobs[..., None] + rng.integers(0, 60, (*shape, 3))).astype(np.uint8)
    tifffile.imwrite(
        path, pixels, tile=(tile, tile), photometric="rgb", compression="deflate",
        resolution=(20000, 20000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def make_slide():
    return write_slide


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    """A tiled RGB TIFF of 600 x 500 px."""
    return write_slide(tmp_path_factory.mktemp("slide") / "slide.tif")


@pytest.fixture(scope="session")
def flags():
    """Arguments of `tilepipe run` for a network that takes milliseconds; 20 units of 128 px."""
    network = [
        "--model", "unet", "--weights", "random:0", "--base", "2", "--option", "depth=1",
        "--precision", "fp32", "--backend", "torch", "--device", "cpu", "--no-tune", "--quiet",
    ]  # fmt: skip
    return [*network, "--unit", "128"]


def shards(store):
    """Every stored object but metadata: its place and its bytes, the journal's records too."""
    store = Path(store)
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    }


def same(one, other):
    """Assert that two stores hold the same bytes, and that nothing unfinished lies in them."""
    one, other = (found if isinstance(found, dict) else shards(found) for found in (one, other))
    assert one.keys() == other.keys()
    different = [name for name in one if pixels_of(name, one[name]) != pixels_of(name, other[name])]
    assert not different
    assert not [name for name in one if name.endswith(".partial")]


def pixels_of(name, raw):
    """The bytes, or of a journal record what does not tell of one run alone."""
    if not name.startswith("tilepipe/journal/"):
        return raw
    record = json.loads(raw)
    return {key: record[key] for key in ("stage", "level", "iy", "ix", "checksum")}


@pytest.fixture(scope="session")
def equal():
    return same


@pytest.fixture(scope="session")
def at_rest():
    """What lies in a store at a moment when nobody writes to it, None at others."""

    def look(store):
        with contextlib.suppress(FileNotFoundError):  # renamed while it is looked at
            found = shards(store)
            return None if any(name.endswith(".partial") for name in found) else found
        return None

    return look


@pytest.fixture(scope="session")
def records():
    """Count the journal records of a store: units that are done."""

    def count(store):
        return len(list((Path(store) / "tilepipe" / "journal").rglob("*.json")))

    return count


@pytest.fixture(scope="session")
def reference(zygote, slide, flags, tmp_path_factory):
    """The store of an undisturbed local run."""
    store = tmp_path_factory.mktemp("reference") / "reference.zarr"
    zygote.run("run", slide, "-o", store, *flags)
    return store


@pytest.fixture(scope="session")
def wait_until():
    def wait(condition, what, *, timeout_s=WAIT_S):
        end_s = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end_s, f"waited in vain for {what}"
            time.sleep(0.02)
        return found

    return wait


@dataclass
class Bucket:
    """The bucket ``slides`` of an S3 server in this process."""

    endpoint: str
    client: Any
    puts: Counter = field(default_factory=Counter)
    """How often each path was written."""


@pytest.fixture(scope="module")
def bucket():
    """A real S3 server over HTTP; this process's environment leads to it."""
    boto3 = pytest.importorskip("boto3")
    server_room = pytest.importorskip("moto.moto_server.threaded_moto_server")
    pytest.importorskip("obstore")
    puts, lock = Counter(), threading.Lock()

    def counting(app):
        def answer(environ, start_response):
            if environ["REQUEST_METHOD"] == "PUT":
                with lock:
                    puts[environ["PATH_INFO"]] += 1
            return app(environ, start_response)

        return answer

    inner = server_room.DomainDispatcherApplication
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            server_room, "DomainDispatcherApplication", lambda *args: counting(inner(*args))
        )
        server = server_room.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="slides")
        puts.clear()
        yield Bucket(endpoint, client, puts)
        server.stop()
