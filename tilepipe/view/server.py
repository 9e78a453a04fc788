"""``ViewServer``: the read-only HTTP server on 127.0.0.1 behind the page."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.view import render
from tilepipe.view.objects import find_object, region_at
from tilepipe.view.pyramid import ShownPyramid
from tilepipe.view.source import Source, open_sources

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# The hash is of the one style that OpenSeadragon puts into the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_IMAGE = re.compile(r"t/(\d{1,3})/image/(\d{1,2})/(\d{1,7})_(\d{1,7})\.(jpg|png)")
_LABEL = re.compile(r"t/(\d{1,3})/label/(\d{1,4})/(\d{1,2})/(\d{1,7})_(\d{1,7})\.bin")
_CHANCE = re.compile(
    r"t/(\d{1,3})/probability/(\d{1,4})/(\d{1,3})/(\d{1,2})/(\d{1,7})_(\d{1,7})\.bin"
)
_BLANK = (34, 38, 46)

Reply = tuple[bytes, str, dict[str, str]]
"""Body, content type, further headers."""


class NoSuchThing(Exception):
    """What is asked for is not there: 404."""


class ViewServer(ThreadingHTTPServer):
    """Serves stores and nothing else; every address starts with a random token."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, locations: list[str], *, port: int = 0, cache_bytes: int = 256 << 20
    ) -> None:
        self.sources: list[Source] = open_sources(locations, cache_bytes=cache_bytes)
        self.token = secrets.token_urlsafe(18)
        self.static = _static_files()
        # Decoding is the work; more at once than cores only costs memory.
        self.rendering = threading.BoundedSemaphore(max(2, os.cpu_count() or 2))
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise StoreError(
                f"port {port} of this computer cannot be used: {error}; choose another --port, "
                "or none for a free one"
            ) from error

    @property
    def url(self) -> str:
        """Address to open."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _static_files() -> dict[str, tuple[bytes, str]]:
    """Return the page's own files by name; nothing else can be asked for by a name."""
    root = files("tilepipe.view") / "static"
    found = {}
    for folder, prefix in ((root, ""), (root / "vendor", "vendor/")):
        for file in folder.iterdir():
            kind = _TYPES.get("." + file.name.rsplit(".", 1)[-1])
            if file.is_file() and kind is not None:
                found[prefix + file.name] = (file.read_bytes(), kind)
    return found


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    server_version = "tilepipe"
    sys_version = ""
    timeout = 30
    # Head and body in one write: two small ones wait 40 ms for each other on the way.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer one request; whatever goes wrong is an answer too."""
        try:
            reply = self._reply()
        except NoSuchThing:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        except PermissionError:
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        except TilepipeError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
            return
        self._send(*reply)

    do_HEAD = do_GET

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return lambda: self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the terminal belongs to the command."""

    def _refuse(self, status: HTTPStatus, message: str = "") -> None:
        self.close_connection = True
        body = f"{status.value} {message or status.phrase}\n".encode()
        self.send_response(status)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self._protect()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, body: bytes, kind: str, headers: dict[str, str]) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
        same = tag in [part.strip() for part in self.headers.get("If-None-Match", "").split(",")]
        self.send_response(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK)
        self.send_header("ETag", tag)
        # Kept by the browser, but asked about each time: a running job changes tiles.
        self.send_header("Cache-Control", "private, no-cache")
        self._protect()
        if not same:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
        self.end_headers()
        if not same and self.command != "HEAD":
            self.wfile.write(body)

    def _protect(self) -> None:
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")

    def _reply(self) -> Reply:
        # A page elsewhere whose name was made to point here sends its own name as Host.
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or _HOST.fullmatch(hosts[0].strip()) is None:
            raise PermissionError
        try:
            parts = urlsplit(self.path)
            token, slash, rest = parts.path.removeprefix("/").partition("/")
            if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
                raise NoSuchThing
            # An empty list is one: of no channel, of no class.
            found = parse_qs(parts.query, keep_blank_values=True, max_num_fields=20)
            query = {key: values[0] for key, values in found.items()}
            return self._route(rest, query)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            if isinstance(error, TilepipeError):
                raise
            raise NoSuchThing from error

    def _route(self, path: str, query: dict[str, str]) -> Reply:
        if path == "":
            path = "static/index.html"
        if path.startswith("static/"):
            body, kind = self.server.static[path.removeprefix("static/")]
            return body, kind, {}
        if match := _IMAGE.fullmatch(path):
            index, level, ty, tx = (int(part) for part in match.groups()[:4])
            return self._image_tile(self._source(index), level, ty, tx, match[5], query)
        if match := _LABEL.fullmatch(path):
            index, label, level, ty, tx = (int(part) for part in match.groups())
            return self._label_tile(self._source(index).label(label).pyramid, level, ty, tx)
        if match := _CHANCE.fullmatch(path):
            index, label, channel, level, ty, tx = (int(part) for part in match.groups())
            beside = self._source(index).label(label).probabilities
            if beside is None:
                raise NoSuchThing
            return self._label_tile(beside, level, ty, tx, channel)
        if path == "api/describe":
            return _json([source.describe() for source in self.server.sources])
        source = self._source(_number(query.get("source", "0")))
        if path == "api/progress":
            return _json(source.progress(_number(query.get("since", "0"))))
        if path == "api/channels":
            with self.server.rendering:
                return _json(source.channels())
        if path == "api/pixel":
            with self.server.rendering:
                return _json(source.pixel(_number(query["y"]), _number(query["x"])))
        if path == "api/object":
            with self.server.rendering:
                return _json(_object(source, query))
        raise NoSuchThing

    def _source(self, index: int) -> Source:
        return self.server.sources[index]

    def _image_tile(
        self, source: Source, level: int, ty: int, tx: int, form: str, query: dict[str, str]
    ) -> Reply:
        import numpy as np

        kind = "image/jpeg" if form == "jpg" else "image/png"
        image = source.image
        if image is None:
            pixels = np.full((8, 8, 3), _BLANK, dtype=np.uint8)
        else:
            rows, columns = image.grid_shape(level)
            if ty >= rows or tx >= columns:
                raise NoSuchThing
            text = query.get("c")
            channels = source.store.channels
            windows = render.parse_windows(text, channels=channels) if text is not None else None
            with self.server.rendering:
                block = image.block(level, ty, tx)
                shown = source.windows() if windows is None else windows
                pixels = render.compose_rgb(block, shown, rgb=source.store.rgb)
        return (render.to_jpeg(pixels) if form == "jpg" else render.to_png(pixels)), kind, {}

    def _label_tile(
        self, pyramid: ShownPyramid, level: int, ty: int, tx: int, channel: int | None = None
    ) -> Reply:
        """Ids of a label, or one channel of its probabilities."""
        from tilepipe.tiling import Box

        rows, columns = pyramid.grid_shape(level)
        if ty >= rows or tx >= columns:
            raise NoSuchThing
        # One px more on inner sides: the page draws outlines without seams.
        whole = Box.of_shape(pyramid.levels[level].shape)
        box = pyramid.tile_box(level, ty, tx).grow(1).intersect(whole)
        with self.server.rendering:
            pixels = pyramid.read(level, box)
            body = render.to_gzip(pixels if channel is None else pixels[channel])
        return body, "application/octet-stream", {"Content-Encoding": "gzip"}


def _object(source: Source, query: dict[str, str]) -> dict[str, Any]:
    pyramid = source.label(_number(query.get("label", "0"))).pyramid
    backwards = query.get("direction") == "previous"
    if "region" in query:
        cursor = (_number(query["region"]), _number(query["place"], least=-1))
    else:
        region = region_at(pyramid, _number(query.get("y", "0")), _number(query.get("x", "0")))
        cursor = (region, 1 << 40 if backwards else -1)
    classes = None
    if "classes" in query:
        named = query["classes"].split(",")[:256] if query["classes"] else ()
        classes = frozenset(_number(part) for part in named)
    found = find_object(pyramid, classes=classes, cursor=cursor, backwards=backwards)
    if found["found"]:
        found["class"] = source.label(_number(query.get("label", "0"))).class_name(found["value"])
    return found


def _number(text: str, *, least: int = 0) -> int:
    if re.fullmatch(r"-?\d{1,13}", text) is None or int(text) < least:
        raise ValueError(f"{text[:20]!r} is no number that fits here")
    return int(text)


def _json(value: Any) -> Reply:
    return json.dumps(value, default=str).encode(), "application/json", {}
