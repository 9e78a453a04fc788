"""The view server: what it answers, what it refuses, and that it stays alive."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import http.client
import io
import json
import random
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tilepipe.errors import StoreError
from tilepipe.spec import default_classes
from tilepipe.store import create_store, reduce_image, reduce_label
from tilepipe.view import objects
from tilepipe.view.objects import _parts
from tilepipe.view.server import ViewServer
from tilepipe.view.source import open_sources

SIDES = (1300, 1100)
UNIT = 1024


def write_pyramid(levels, reduce, pixels):
    for level in levels:
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (3, *SIDES), dtype=np.uint8)
    mask = np.zeros(SIDES, dtype=np.uint8)
    mask[100:400, 200:500] = 1
    mask[1000:1040, 900:1060] = 2
    mask[600, 700] = 1
    return image, mask


@pytest.fixture(scope="module")
def store_path(tmp_path_factory, pixels):
    image, mask = pixels
    path = tmp_path_factory.mktemp("view") / "slide.zarr"
    store = create_store(
        str(path),
        channels=3,
        dtype="uint8",
        extent=SIDES,
        mpp=(0.5, 0.5),
        channel_names=(),
        channel_colors=(),
        rgb=True,
        unit_px=UNIT,
    )
    write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, image)
    label = store.create_label("unet", classes=default_classes(3), unit_px=UNIT)
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
    return path


@pytest.fixture(scope="module")
def server(store_path):
    server = ViewServer([str(store_path)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path, *, method="GET", token=True, headers=None):
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        target = f"/{server.token}/{path}" if token else path
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def raw(server, request):
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def test_the_page_and_its_policy(server):
    status, body, headers = ask(server, "")
    assert status == 200
    assert b"<title>tilepipe</title>" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"http://" not in body.replace(b"http://www.w3.org", b"")
    for name in ("style.css", "app.js", "vendor/openseadragon.min.js", "icon.svg"):
        assert ask(server, f"static/{name}")[0] == 200
    licence = ask(server, "static/vendor/OPENSEADRAGON-LICENSE.txt")[1]
    assert b"OpenSeadragon contributors" in licence


def test_description(server):
    (source,) = json.loads(ask(server, "api/describe")[1])
    assert source["extent"] == list(SIDES)
    assert source["mpp"] == [0.5, 0.5]
    assert [level["downsample"] for level in source["levels"]] == [1, 2, 4]
    (label,) = source["labels"]
    assert [one["name"] for one in label["classes"]] == ["background", "class 1", "class 2"]
    assert sum(one["share"] for one in label["classes"]) == pytest.approx(1)


def test_label_tiles_are_the_mask_with_one_px_more_inside(server, pixels):
    mask = pixels[1]
    status, body, headers = ask(server, "t/0/label/0/0/1_0.bin")
    assert (status, headers["Content-Encoding"]) == (200, "gzip")
    tile = np.frombuffer(gzip.decompress(body), dtype=np.uint8).reshape(514, 513)
    assert np.array_equal(tile, mask[511:1025, 0:513])
    last = np.frombuffer(gzip.decompress(ask(server, "t/0/label/0/0/2_2.bin")[1]), dtype=np.uint8)
    assert np.array_equal(last.reshape(277, 77), mask[1023:1300, 1023:1100])


def test_image_tiles_are_the_image(server, pixels):
    status, body, headers = ask(server, "t/0/image/0/1_1.png")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    tile = np.asarray(Image.open(io.BytesIO(body)))
    assert np.array_equal(tile, np.moveaxis(pixels[0][:, 512:1024, 512:1024], 0, -1))
    jpeg = ask(server, "t/0/image/2/0_0.jpg")[1]
    assert Image.open(io.BytesIO(jpeg)).size == (275, 325)


def test_of_no_channel_nothing_is_shown(tmp_path):
    path = tmp_path / "two.zarr"
    store = create_store(
        str(path), channels=2, dtype="uint16", extent=(64, 64), mpp=None,
        channel_names=("a", "b"), channel_colors=(), rgb=False, unit_px=64,
    )  # fmt: skip
    image = np.full((2, 64, 64), 900, np.uint16)
    image[:, :8] = 100
    write_pyramid([store.image(0)], reduce_image, image)
    server = ViewServer([str(path)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        for query, shown in (("?c=", 0), ("", 255)):
            status, body, _ = ask(server, f"t/0/image/0/0_0.png{query}")
            assert status == 200
            assert np.asarray(Image.open(io.BytesIO(body))).max() == shown, query
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_of_no_class_there_is_no_object(server):
    answer = json.loads(ask(server, "api/object?direction=next&classes=&y=0&x=0")[1])
    assert answer["found"] is False
    answer = json.loads(ask(server, "api/object?direction=next&y=0&x=0")[1])
    assert answer["found"] is True


def test_the_pixel_under_the_pointer(server, pixels):
    image, mask = pixels
    for y, x in [(0, 0), (399, 499), (1020, 1000), (1299, 1099)]:
        answer = json.loads(ask(server, f"api/pixel?y={y}&x={x}")[1])
        assert answer["image"] == image[:, y, x].tolist()
        assert answer["labels"][0]["value"] == mask[y, x]


def test_unchanged_tiles_are_not_sent_again(server):
    _, _, headers = ask(server, "t/0/label/0/0/0_0.bin")
    again = {"If-None-Match": headers["ETag"]}
    assert ask(server, "t/0/label/0/0/0_0.bin", headers=again)[:2] == (304, b"")
    assert ask(server, "t/0/label/0/0/1_1.bin", headers=again)[0] == 200


def test_next_and_previous_object(server):
    def step(direction, cursor=""):
        answer = ask(server, f"api/object?classes=1,2&y=0&x=0&direction={direction}{cursor}")
        found = json.loads(answer[1])
        return found, "&region={}&place={}".format(*found["cursor"])

    first, cursor = step("next")
    assert first["box"] == [100, 200, 400, 500]
    assert (first["y"], first["x"], first["area_px"]) == (250, 350, 90_000)
    second, cursor = step("next", cursor)
    assert second["box"] == [600, 700, 601, 701]
    third, cursor = step("next", cursor)
    assert third["class"] == "class 2"
    end, _ = step("next", cursor)
    assert end["found"] is False
    back, _ = step("previous", cursor)
    assert back["box"] == second["box"]


def test_the_area_of_an_object_that_goes_on_in_the_next_region_is_not_told_as_whole(monkeypatch):
    class Mask:
        def __init__(self, mask) -> None:
            self.mask, self.levels = mask, [SimpleNamespace(shape=mask.shape, downsample=1)]

        def read(self, level, box):
            return self.mask[box.slices]

    monkeypatch.setattr(objects, "REGION_PX", 64)
    mask = np.zeros((100, 100), np.uint8)
    mask[10:20, 10:90] = mask[70:100, 10:20] = 1
    found, cursor = [], (0, -1)
    while (one := objects.find_object(Mask(mask), classes=None, cursor=cursor, backwards=False))[
        "found"
    ]:
        found.append((one["box"], one["whole"]))
        cursor = tuple(one["cursor"])
    assert found == [([10, 10, 20, 64], False), ([70, 10, 100, 20], True)]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "", "127.0.0.1:80@x"]
)
def test_other_hosts_are_refused(server, host):
    request = f"GET /{server.token}/ HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert raw(server, request.encode()).startswith(b"HTTP/1.1 403")


def test_no_host_or_two_are_refused(server):
    for hosts in ("", "Host: localhost\r\nHost: localhost\r\n"):
        request = f"GET /{server.token}/ HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n"
        assert raw(server, request.encode()).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1", "[::1]:80"])
def test_this_computer_under_any_port_is_served(server, host):
    # A forwarded port (ssh -L) arrives with the port of the other end.
    assert ask(server, "", headers={"Host": host})[0] == 200


def test_without_the_token_nothing_is_told(server):
    wrong = server.token[:-1] + ("a" if server.token[-1] != "a" else "b")
    for path in ("/", "/static/app.js", f"/{wrong}/", f"/{server.token}", "/api/describe"):
        status, body, _ = ask(server, path, token=False)
        assert status == 404
        assert server.token.encode() not in body


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "static/../../etc/passwd",
        "static/..%2f..%2fserver.py",
        "%2e%2e/%2e%2e/etc/passwd",
        "static/vendor/../app.js",
        "t/0/label/0/0/..%2f0_0.bin",
        "t/9/image/0/0_0.jpg",
        "t/0/image/9/0_0.jpg",
        "t/0/image/0/9999999_0.jpg",
        "t/0/image/0/99999999999999999999_0.jpg",
        "t/0/image/0/-1_0.jpg",
        "t/0/label/7/0/0_0.bin",
        "t/0/label/0/9/0_0.bin",
        "t/0/label/0/0/3_0.bin",
        "api/pixel?y=-1&x=0",
        "api/pixel?y=999999&x=0",
        "api/pixel",
        "api/pixel?y=1e9&x=nan",
        "api/object?label=44",
        "api/progress?source=9",
        "api/nothing",
        "api/describe/",
    ],
)
def test_what_is_not_there(server, path):
    status, body, _ = ask(server, path)
    assert status == 404
    assert b"root:" not in body


@pytest.mark.parametrize("address", ["http://[", "http://[::1/", "http://]x["])
def test_an_address_that_is_none_is_answered(server, address, capsys):
    # No token is needed to ask so: any page may, and the terminal belongs to the command.
    host = f"Host: 127.0.0.1:{server.server_address[1]}\r\n"
    answer = raw(server, f"GET {address} HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "FOO"])
def test_unknown_methods_are_refused(server, method):
    status, _, headers = ask(server, "", method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(server):
    status, body, headers = ask(server, "t/0/image/0/0_0.jpg", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


def test_garbage_leaves_it_alive(server):
    random.seed(1)
    alphabet = bytes(range(256))
    for index in range(300):
        line = bytes(random.choices(alphabet, k=random.randint(0, 200)))
        if index % 3 == 0:
            line = f"GET /{server.token}/".encode() + line + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            raw(server, line)
    assert ask(server, "api/describe")[0] == 200


@pytest.mark.slow
def test_ten_thousand_random_requests_leave_it_alive(server):
    rng = random.Random(2)
    port = server.server_address[1]
    words = [
        "t",
        "0",
        "image",
        "label",
        "api",
        "pixel",
        "static",
        "..",
        "%2e",
        "1_1.bin",
        "0_0.jpg",
    ]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(10_000):
        path = "/".join(rng.choices(words, k=rng.randint(1, 6))) + rng.choice(
            ["", "?y=1&x=2", f"?c={rng.random()}", "?source=zz", "?" + "a=1&" * 50]
        )
        connection.request("GET", f"/{server.token}/{path}")
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 404)
    connection.close()
    assert ask(server, "")[0] == 200


def test_all_of_many_channels_are_shown_at_once(tmp_path):
    path = tmp_path / "forty.zarr"
    store = create_store(str(path), channels=40, dtype="uint8", extent=(8, 8), unit_px=512)
    store.image(0).write_unit(store.image(0).grid.unit(0, 0), np.full((40, 8, 8), 51, np.uint8))
    server = ViewServer([str(path)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        every = [f"{index}:0:255:0a0000" for index in range(40)]
        status, body, _ = ask(server, f"t/0/image/0/0_0.png?c={','.join(every)}")
        assert status == 200
        assert set(np.asarray(Image.open(io.BytesIO(body)))[..., 0].flat) == {40 * 10 * 51 // 255}
        for wrong in ([*every, every[0]], ["40:0:255:0a0000"]):
            assert ask(server, f"t/0/image/0/0_0.png?c={','.join(wrong)}")[0] == 404
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_fifty_clients_at_once(server, pixels):
    mask = pixels[1]

    def one(index):
        ty, tx = index % 3, index // 3 % 3
        status, body, _ = ask(server, f"t/0/label/0/0/{ty}_{tx}.bin")
        y0, x0 = max(0, ty * 512 - 1), max(0, tx * 512 - 1)
        wanted = mask[y0 : ty * 512 + 513, x0 : tx * 512 + 513]
        got = np.frombuffer(gzip.decompress(body), dtype=np.uint8).reshape(wanted.shape)
        return status == 200 and np.array_equal(got, wanted)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(one, range(150)))


def test_a_damaged_shard_is_named(tmp_path, store_path, pixels):
    import shutil

    path = tmp_path / "damaged.zarr"
    shutil.copytree(store_path, path)
    shards = [p for p in (path / "labels" / "unet" / "0" / "c").rglob("*") if p.is_file()]
    shard = max(shards, key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[:200] = bytes(200)
    shard.write_bytes(content)
    server = ViewServer([str(path)])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        status, body, _ = ask(server, "t/0/label/0/0/0_0.bin")
        assert status == 500
        assert b"labels/unet/0" in body
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_is_no_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match=r"nothing\.zarr"):
        ViewServer([str(tmp_path / "nothing.zarr")])


def test_a_taken_port_is_an_error(server, store_path):
    with pytest.raises(StoreError, match="choose another --port"):
        ViewServer([str(store_path)], port=server.server_address[1])


def test_a_pixel_that_is_no_number_is_an_answer_too(tmp_path):
    store = create_store(
        str(tmp_path / "float.zarr"), channels=1, dtype="float32", extent=(40, 50), unit_px=512
    )
    image = np.ones((1, 40, 50), np.float32)
    image[0, 3, 4:7] = np.nan, np.inf, 0.5
    store.image(0).write_unit(store.image(0).grid.unit(0, 0), image)
    source = open_sources([store.location], cache_bytes=1 << 20)[0]
    told = [source.pixel(3, x)["image"] for x in (4, 5, 6)]
    assert told == [[None], [None], [0.5]]
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(("low", "high"), [(-3, 5), (-60, -40), (10, 2000)])
def test_the_range_of_a_channel_holds_its_window(tmp_path, low, high):
    store = create_store(
        str(tmp_path / "float.zarr"), channels=1, dtype="float32", extent=(40, 50), unit_px=512
    )
    image = np.linspace(low, high, 2000, dtype=np.float32).reshape(1, 40, 50)
    store.image(0).write_unit(store.image(0).grid.unit(0, 0), image)
    source = open_sources([store.location], cache_bytes=1 << 20)[0]
    ((least, most), (black, white)) = (
        source.describe()["channels"][0][key] for key in ("range", "window")
    )
    assert least <= min(0, low) <= black < white <= high <= most


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("lowest", [-7, 0])
def test_objects_of_any_integer_kind(dtype, lowest):
    high = {"int64": 2**53 + 1, "uint64": 2**53 + 1}.get(dtype, 9)
    mask = np.zeros((6, 8), np.int64)
    mask[1, 1], mask[2:4, 3], mask[5, 5] = high, 4, lowest if dtype[0] == "i" else 0
    ids = mask.astype(dtype)
    parts, values = _parts(ids, None)
    assert (parts != 0).tolist() == (mask != 0).tolist()
    assert values == [int(one) for one in np.unique(mask) if one]
    assert all((mask[parts == k] == value).all() for k, value in enumerate(values, start=1))
