"""Probabilities as the viewer serves them: the stored bytes, and nothing where there are none."""

from __future__ import annotations

import gzip
import http.client
import json
import threading

import numpy as np
import pytest

from tilepipe.spec import default_classes
from tilepipe.store import create_store, reduce_image
from tilepipe.view.server import ViewServer

SIDES = (600, 1100)


@pytest.fixture(scope="module")
def planes():
    return np.random.default_rng(0).integers(0, 256, (2, *SIDES)).astype(np.uint8)


@pytest.fixture(scope="module")
def server(planes, tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "slide.zarr"
    store = create_store(str(path), channels=1, dtype="uint8", extent=SIDES, unit_px=512)
    store.create_label("plain", classes=default_classes(3), unit_px=512)
    beside = store.create_label(
        "unet", classes=default_classes(3), unit_px=512, probabilities=True
    ).probabilities
    pixels = planes
    for index in range(beside.n_levels):
        for unit in beside.level(index).grid:
            part = np.ascontiguousarray(pixels[(..., *unit.box.slices)])
            beside.level(index).write_unit(unit, part)
        pixels = reduce_image(pixels)
    server = ViewServer([str(path)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request("GET", f"/{server.token}/{path}")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("channel", [0, 1])
def test_tiles_are_one_channel_with_one_px_more_inside(server, planes, channel):
    status, body = ask(server, f"t/0/probability/1/{channel}/0/0_1.bin")
    assert status == 200
    found = np.frombuffer(gzip.decompress(body), np.uint8).reshape(513, 514)
    np.testing.assert_array_equal(found, planes[channel, :513, 511:1025])
    status, body = ask(server, f"t/0/probability/1/{channel}/1/0_0.bin")
    found = np.frombuffer(gzip.decompress(body), np.uint8).reshape(300, 513)
    np.testing.assert_array_equal(found, reduce_image(planes)[channel, :, :513])


def test_the_page_is_told_of_the_channels(server):
    plain, unet = json.loads(ask(server, "api/describe")[1])[0]["labels"]
    assert plain["probabilities"] == []
    assert unet["probabilities"] == [
        {"value": 1, "name": "class 1"}, {"value": 2, "name": "class 2"},
    ]  # fmt: skip


def test_the_pixel_under_the_pointer_has_them(server, planes):
    for y, x in ((0, 0), (599, 1099), (300, 511)):
        plain, unet = json.loads(ask(server, f"api/pixel?y={y}&x={x}")[1])["labels"]
        assert plain["probabilities"] is None
        assert unet["probabilities"] == planes[:, y, x].tolist()


@pytest.mark.parametrize(
    "path", ["0/0/0/0_0", "1/2/0/0_0", "1/0/9/0_0", "1/0/0/2_0", "9/0/0/0_0", "1/-1/0/0_0"]
)
def test_what_is_not_there(server, path):
    assert ask(server, f"t/0/probability/{path}.bin")[0] == 404
