"""Whole jobs on S3: a real server over HTTP, killed and resumed; each object is written once."""

import json
import os
import time
from collections import Counter

import pytest


@pytest.fixture(scope="module")
def env(bucket):
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def objects(bucket, key):
    """Return every object under a key but metadata: name → bytes."""
    found = {}
    for page in bucket.client.get_paginator("list_objects_v2").paginate(
        Bucket="slides", Prefix=key + "/"
    ):
        for item in page.get("Contents", ()):
            name = item["Key"].removeprefix(key + "/")
            if name.rsplit("/", 1)[-1] != "zarr.json":
                found[name] = bucket.client.get_object(Bucket="slides", Key=item["Key"])[
                    "Body"
                ].read()
    return found


def puts(bucket, key):
    """Return how often each object that is no metadata was written."""
    return Counter(
        {
            path: n
            for path, n in bucket.puts.items()
            if path.startswith(f"/slides/{key}/") and not path.endswith("zarr.json")
        }
    )


def test_a_run_killed_and_resumed_on_s3(bucket, env, zygote, slide, flags, reference, equal):
    command = ["run", slide, "-o", "s3://slides/killed.zarr", *flags]
    for _ in range(2):
        process = zygote.start("tilepipe", *command, env=env)
        least = sum(puts(bucket, "killed.zarr").values()) + 10
        while process.poll() is None and sum(puts(bucket, "killed.zarr").values()) < least:
            time.sleep(0.01)
        process.kill()
    kept = {name for name in objects(bucket, "killed.zarr") if name.startswith("tilepipe/")}
    before = puts(bucket, "killed.zarr")
    zygote.run(*command, env=env)
    equal(objects(bucket, "killed.zarr"), reference)
    # What was recorded before was not written again.
    again = {
        path.removeprefix("/slides/killed.zarr/") for path in puts(bucket, "killed.zarr") - before
    }
    assert kept
    assert not kept & again


def test_each_object_is_written_once(bucket, env, zygote, slide, flags, reference, equal):
    zygote.run("run", slide, "-o", "s3://slides/once.zarr", *flags, env=env)
    equal(objects(bucket, "once.zarr"), reference)
    written = puts(bucket, "once.zarr")
    assert set(written.values()) == {1}
    assert len(written) == len(objects(bucket, "once.zarr"))


def test_an_image_on_s3_as_input(bucket, env, zygote, slide, flags, reference, equal):
    """Its mask is added to it, and nothing is copied."""
    zygote.run("ingest", slide, "-o", "s3://slides/image.zarr", "--unit", 128, "--quiet", env=env)
    before = puts(bucket, "image.zarr")
    told = zygote.run("run", "s3://slides/image.zarr", *flags, "--json", env=env)
    assert json.loads(told.splitlines()[-1])["state"] == "done"
    new = {path.removeprefix("/slides/image.zarr/") for path in puts(bucket, "image.zarr") - before}
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


def test_a_lost_object_and_another_image_on_s3(bucket, env, zygote, slide, flags):
    there = "s3://slides/lost.zarr"
    ingest = ["ingest", slide, "-o", there, "--unit", 128, "--quiet"]
    zygote.run(*ingest, env=env)
    zygote.run("run", there, *flags, env=env)
    assert json.loads(zygote.run("run", there, *flags, "--json", env=env))["px"] == 0
    key = "lost.zarr/0/c/0/1/1"
    kept = bucket.client.get_object(Bucket="slides", Key=key)["Body"].read()
    bucket.client.delete_object(Bucket="slides", Key=key)
    assert "lacks 1 units" in zygote.run("run", there, *flags, code=1, env=env)
    zygote.run(*ingest, env=env)
    assert bucket.client.get_object(Bucket="slides", Key=key)["Body"].read() == kept
    assert json.loads(zygote.run("run", there, *flags, "--json", env=env))["px"] == 0
    other = bucket.client.get_object(Bucket="slides", Key="lost.zarr/0/c/0/0/0")["Body"].read()
    bucket.client.put_object(Bucket="slides", Key=key, Body=other)
    assert "of another job" in zygote.run("run", there, *flags, code=1, env=env)


@pytest.mark.parametrize("folder", ["many/", ""])
def test_what_became_of_several_slides_stands_beside_them(
    bucket, env, zygote, slide, flags, tmp_path, folder
):
    (tmp_path / "other.tif").write_bytes(slide.read_bytes())
    here = tmp_path / "here"
    here.mkdir()
    command = ["run", slide, tmp_path / "other.tif", "-o", f"s3://slides/{folder}", *flags]
    process = zygote.start("tilepipe", *command, env=env, cwd=here)
    assert process.wait() == 0, process.text()
    body = bucket.client.get_object(Bucket="slides", Key=f"{folder}status.csv")["Body"].read()
    rows = body.decode().splitlines()
    assert [row.split(",")[2] for row in rows] == ["state", "done", "done"]
    assert not list(here.iterdir())


def test_parts_that_begin_at_once_on_several_machines(
    bucket, env, zygote, slide, flags, reference, equal, tmp_path
):
    """A machine's locks are where its temporary files are: here each part has its own."""
    command = ["run", slide, "-o", "s3://slides/parts.zarr", *flags]
    parts = []
    for share in range(4):
        own = tmp_path / f"machine{share}"
        own.mkdir()
        parts.append(
            zygote.start(
                "tilepipe", *command, "--part", f"{share}/4", env={**env, "TMPDIR": str(own)}
            )
        )
    for part in parts:
        assert part.wait() == 0, part.text()
        assert "are gone" not in part.text()
    zygote.run("finish", "s3://slides/parts.zarr", "--quiet", env=env)
    equal(objects(bucket, "parts.zarr"), reference)
    assert not objects(bucket, "parts.zarr.preparing")
