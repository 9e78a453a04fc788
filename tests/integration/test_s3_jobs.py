"""Whole jobs on S3: a real server over HTTP, killed and resumed; each object is written once."""

import json
import os
import threading
import time
from collections import Counter

import pytest

boto3 = pytest.importorskip("boto3")
server_room = pytest.importorskip("moto.moto_server.threaded_moto_server")
pytest.importorskip("obstore")

PUTS = Counter()
_LOCK = threading.Lock()


class _Counting:
    """WSGI middle layer that counts the PUT requests by path."""

    def __init__(self, app):
        self.app = app

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT":
            with _LOCK:
                PUTS[environ["PATH_INFO"]] += 1
        return self.app(environ, start_response)


@pytest.fixture(scope="module")
def bucket():
    """Environment of a process that sees the bucket ``slides``."""
    patch = pytest.MonkeyPatch()
    inner = server_room.DomainDispatcherApplication
    patch.setattr(server_room, "DomainDispatcherApplication", lambda *args: _Counting(inner(*args)))
    server = server_room.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in list(os.environ):
        if name.startswith("AWS_"):
            patch.delenv(name)
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }
    for name, value in env.items():
        patch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket="slides")
    yield client
    server.stop()
    patch.undo()


@pytest.fixture(scope="module")
def env(bucket):
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def objects(bucket, key):
    """Return every object under a key but metadata: name → bytes."""
    found = {}
    for page in bucket.get_paginator("list_objects_v2").paginate(Bucket="slides", Prefix=key + "/"):
        for item in page.get("Contents", ()):
            name = item["Key"].removeprefix(key + "/")
            if name.rsplit("/", 1)[-1] != "zarr.json":
                found[name] = bucket.get_object(Bucket="slides", Key=item["Key"])["Body"].read()
    return found


def puts(key):
    """Return how often each object that is no metadata was written."""
    return Counter(
        {
            path: n
            for path, n in PUTS.items()
            if path.startswith(f"/slides/{key}/") and not path.endswith("zarr.json")
        }
    )


def test_a_run_killed_and_resumed_on_s3(bucket, env, zygote, slide, flags, reference, equal):
    command = ["run", slide, "-o", "s3://slides/killed.zarr", *flags]
    for _ in range(2):
        process = zygote.start("tilepipe", *command, env=env)
        least = sum(puts("killed.zarr").values()) + 10
        while process.poll() is None and sum(puts("killed.zarr").values()) < least:
            time.sleep(0.01)
        process.kill()
    kept = {name for name in objects(bucket, "killed.zarr") if name.startswith("tilepipe/")}
    before = puts("killed.zarr")
    zygote.run(*command, env=env)
    equal(objects(bucket, "killed.zarr"), reference)
    # What was recorded before was not written again.
    again = {path.removeprefix("/slides/killed.zarr/") for path in puts("killed.zarr") - before}
    assert kept
    assert not kept & again


def test_each_object_is_written_once(bucket, env, zygote, slide, flags, reference, equal):
    zygote.run("run", slide, "-o", "s3://slides/once.zarr", *flags, env=env)
    equal(objects(bucket, "once.zarr"), reference)
    written = puts("once.zarr")
    assert set(written.values()) == {1}
    assert len(written) == len(objects(bucket, "once.zarr"))


def test_an_image_on_s3_as_input(bucket, env, zygote, slide, flags, reference, equal):
    """Its mask is added to it, and nothing is copied."""
    zygote.run("ingest", slide, "-o", "s3://slides/image.zarr", "--unit", 128, "--quiet", env=env)
    before = puts("image.zarr")
    told = zygote.run("run", "s3://slides/image.zarr", *flags, "--json", env=env)
    assert json.loads(told.splitlines()[-1])["state"] == "done"
    new = {path.removeprefix("/slides/image.zarr/") for path in puts("image.zarr") - before}
    assert all(name.startswith(("labels/unet/", "tilepipe/journal/unet/")) for name in new)
    masks = {
        name: raw
        for name, raw in objects(bucket, "image.zarr").items()
        if name.startswith("labels/")
    }
    equal(
        masks,
        {
            f"labels/{path.relative_to(reference / 'labels')}": path.read_bytes()
            for path in (reference / "labels").rglob("*")
            if path.is_file() and path.name != "zarr.json"
        },
    )


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket, env, zygote, slide, flags):
    text = zygote.run("run", slide, "-o", "s3://missing/out.zarr", *flags, env=env, code=1)
    assert text.count("Error:") == 1
    assert "s3://missing/out.zarr" in text
    assert "Traceback" not in text
