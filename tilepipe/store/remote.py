"""``RemoteFiles``: the same file operations on S3, through obstore."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store as ZarrStore
from zarr.storage import ObjectStore

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.store.explain import reason_of
from tilepipe.store.files import Entry, check_key

if TYPE_CHECKING:
    from obstore.store import S3Store

_PARALLEL_GETS = 16
_ROLE_SERVER = "169.254.169.254"
"""Where a machine at Amazon is asked for credentials, by obstore, if the environment has none."""
_PUT_TIMEOUT = timedelta(minutes=5)
"""For one request of a put, at most 5 MiB of a shard. All lanes send their shards at once, over one
line: in obstore's own 30 s, twelve lanes with units of 4096 px would need 100 Mbit/s, and on a
slower line nothing would ever arrive."""
_WAIT = timedelta(seconds=60)
"""How long a cut network or a server that asks to slow down is waited for; obstore's own are three
minutes."""
_FEW, _MANY = 8, 1000
"""Tries meanwhile. Eight are over in 1 to 15 s, often in 3 (each wait is chosen by chance): enough
until something was read there, so that a wrong address is told soon. From then on, and to write,
it is tried until the time is up."""


@contextmanager
def explained_remote(location: str, doing: str) -> Iterator[None]:
    """Turn obstore's errors into a StoreError of one line."""
    try:
        yield
    except TilepipeError:
        raise
    except Exception as error:
        raise StoreError(
            f"{location}: cannot {doing}: {_reason(error)}; check the address, AWS_ENDPOINT_URL, "
            "AWS_REGION and the credentials, then run the same command again"
        ) from error


def _reason(error: Exception) -> str:
    if _ROLE_SERVER in str(error):
        return (
            "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles "
            "in ~/.aws are not read), or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    return reason_of(error)


class RemoteFiles:
    """Files under ``s3://bucket/key``.

    Endpoint, region and credentials come from the usual environment (``AWS_ENDPOINT_URL``,
    ``AWS_ACCESS_KEY_ID``, …). A put is atomic by S3's own rule.
    """

    def __init__(self, location: str, *, whole_bucket: bool = False) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as error:
            raise StoreError(
                f"{location}: s3:// needs obstore; pip install 'tilepipe[s3]'"
            ) from error
        self.location = location.rstrip("/")
        bucket, _, prefix = self.location.removeprefix("s3://").partition("/")
        if not bucket or not (prefix or whole_bucket):
            raise StoreError(f"{location}: give a bucket and a key, s3://bucket/name.zarr")
        if prefix:
            check_key(location, prefix)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            config["region"] = "us-east-1"

        def client(retries: int, **options: Any) -> S3Store:
            return S3Store(
                bucket,
                prefix=prefix or None,
                config=config,
                client_options={"allow_http": endpoint.startswith("http://"), **options},
                retry_config={"max_retries": retries, "retry_timeout": _WAIT},
            )

        with explained_remote(self.location, "open the address"):
            self._first = client(_FEW)
            self._reads = client(_MANY)
            self._writes = client(_MANY, timeout=_PUT_TIMEOUT)
        self._has_answered = False
        self._obs: Any = obstore

    @property
    def _store(self) -> S3Store:
        return self._reads if self._has_answered else self._first

    def is_file(self) -> bool:
        """Tell whether there is an object of the location's own name."""
        with explained_remote(self.location, "read the object of that name"):
            try:
                self._obs.head(self._store, "")
            except FileNotFoundError:
                return False
        return True

    def check_inside(self, key: str) -> None:
        """Raise StoreError for a key that is not plain names; there are no links on S3."""
        check_key(self.location, key)

    def get(self, key: str, *, limit_bytes: int | None = None) -> bytes | None:
        """Return the bytes of ``key``, None if there is none; StoreError above the limit."""
        check_key(self.location, key)
        with explained_remote(self.location, f"read {key}"):
            try:
                found = self._obs.get(self._store, key)
            except FileNotFoundError:
                self._has_answered = True
                return None
            self._has_answered = True
            if limit_bytes is not None and found.meta["size"] > limit_bytes:
                raise StoreError(f"{self.location}: {key} is larger than {limit_bytes} bytes")
            return bytes(found.bytes())

    def get_many(self, keys: Iterable[str], *, limit_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Yield the bytes of those ``keys`` that exist; b"" for one above the limit."""

        def fetch(key: str) -> tuple[str, bytes | None]:
            with explained_remote(self.location, f"read {key}"):
                try:
                    found = self._obs.get(self._store, key)
                except FileNotFoundError:
                    return key, None
                return key, b"" if found.meta["size"] > limit_bytes else bytes(found.bytes())

        with ThreadPoolExecutor(_PARALLEL_GETS) as pool:
            for key, value in pool.map(fetch, keys):
                if value is not None:
                    yield key, value

    def put(self, key: str, value: Any, *, durable: bool = False) -> None:
        """Write a buffer or several as one object; S3 answers when it is durable."""
        check_key(self.location, key)
        whole = b"".join(value) if isinstance(value, Iterator) else bytes(value)
        with explained_remote(self.location, f"write {key}"):
            self._obs.put(self._writes, key, whole)

    def claim(self, key: str, value: bytes) -> bool:
        """Write ``key`` unless it is there; of several who try at once one does. Tell whether."""
        from obstore.exceptions import AlreadyExistsError

        check_key(self.location, key)
        with explained_remote(self.location, f"write {key}"):
            try:
                self._obs.put(self._writes, key, value, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def delete_root(self) -> None:
        """Do nothing: there are no folders."""

    def delete(self, key: str) -> None:
        """Remove ``key`` if it is there."""
        check_key(self.location, key)
        with explained_remote(self.location, f"remove {key}"):
            try:
                self._obs.delete(self._reads, key)
            except FileNotFoundError:
                return

    def entries(self, folder: str) -> Iterator[Entry]:
        """Yield what lies directly under ``folder``.

        An object ``folder/`` is none of it: programs that show a bucket as folders make such
        markers, and obstore lists one as the folder itself.
        """
        with explained_remote(self.location, f"list {folder or 'the store'}"):
            found = self._obs.list_with_delimiter(self._store, folder or None)
        self._has_answered = True
        for prefix in found["common_prefixes"]:
            yield Entry(str(prefix).rstrip("/").rsplit("/", 1)[-1], True, 0)
        for item in found["objects"]:
            if item["path"] != folder:
                name = item["path"].rsplit("/", 1)[-1]
                yield Entry(name, False, item["size"], str(item["e_tag"] or ""))

    def delete_tree(self, folder: str, *, keep: Collection[str] = ()) -> None:
        """Remove all under ``folder`` but the top names ``keep``."""
        start = f"{folder}/" if folder else ""
        with explained_remote(self.location, f"remove {folder or 'the old store'}"):
            for batch in self._obs.list(self._store, folder or None):
                paths = [
                    item["path"]
                    for item in batch
                    if item["path"] != folder
                    and item["path"].removeprefix(start).split("/", 1)[0] not in keep
                ]
                if paths:
                    self._obs.delete(self._store, paths)

    def clean_partial(self) -> int:
        """Return 0: an object is there whole or not at all."""
        return 0

    def zarr_store(self, *, read_only: bool) -> ZarrStore:
        """Return zarr's view of the prefix."""
        return ObjectStore(self._reads if read_only else self._writes, read_only=read_only)
