"""``leased``: one machine at a time at a place that several machines write.

The kernel's locks hold on one machine. A lease is a file beside the place that whoever has it
renews all the time; one that is renewed no more is its holder's, who died, and is taken over. Only
the waiter's own clock counts: what it compares are the file's bytes, not times. Where the holder
was a process of the waiter's own machine, that is asked instead.
"""

from __future__ import annotations

import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tilepipe.errors import StoreError
from tilepipe.store.alive import WHERE, is_gone
from tilepipe.store.files import Files, open_files

RENEWED_S = 5.0
STALE_S = 60.0
"""How long a lease may stay unchanged: a machine that is short of memory may sleep for long."""
_KEY = "lease.json"
_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Patience:
    """How long those that wait for a lease do what."""

    look_s: float = 1.0
    stale_s: float = STALE_S


@contextmanager
def leased(
    location: str,
    *,
    on_wait: Callable[[str], None] = lambda _: None,
    patience: Patience = Patience(),
) -> Iterator[Callable[[], None]]:
    """Hold a place, local or ``s3://``, against all machines that see it; waits until it is free.

    ``on_wait`` is called once, with who has it. The lease lies beside the place, in
    ``<location>.preparing``, and goes with its holder. Yields what raises StoreError once another
    has taken it over: of a holder that slept for long, before it takes away what lies there.

    Raises StoreError where no file can be written there, and where a lease was left behind that
    cannot be taken over.
    """
    files = open_files(f"{location.rstrip('/')}.preparing")
    token = uuid.uuid4().hex
    _take(files, token, on_wait, patience)
    over = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(files, token, over), name="tilepipe-lease", daemon=True
    )
    renewing.start()

    def check() -> None:
        if _holder(files) != token:
            raise StoreError(
                f"{location}: another process took over there while this one was asleep or cut "
                "off; give the same command again"
            )

    try:
        yield check
    finally:
        over.set()
        renewing.join()
        with suppress(StoreError):  # it ages, and is taken over
            if _holder(files) == token:
                files.delete(_KEY)
            files.delete_root()


def _take(files: Files, token: str, on_wait: Callable[[str], None], patience: Patience) -> None:
    seen: bytes | None = None
    since_s = first_s = time.monotonic()
    told = False
    while True:
        now = files.get(_KEY, limit_bytes=_LIMIT_BYTES)
        if now is None:
            files.claim(_KEY, _content(token, 0))
            # What lies there decides: the answer to a claim may be lost, and it is sent again.
            now = files.get(_KEY, limit_bytes=_LIMIT_BYTES) or b""
        if _values(now).get("token") == token:
            return
        clock_s = time.monotonic()
        if now != seen:
            seen, since_s = now, clock_s
        is_left = clock_s - since_s > patience.stale_s or _is_of_the_dead(now)
        if is_left and _take_over(files, now, token):
            return
        if clock_s - since_s > 3 * patience.stale_s:
            raise StoreError(
                f"{files.location}: a lease was left there by {_said(now)}; remove it if no "
                "tilepipe is at work on that output"
            )
        if not told and clock_s - first_s > 3 * patience.look_s:
            told = True
            on_wait(_said(now))
        time.sleep(patience.look_s * random.uniform(0.5, 1.0))  # not all at the same moment


def _take_over(files: Files, stale: bytes, token: str) -> bool:
    """Replace a lease that is renewed no more; of several who want to, one may."""
    right = f"over-{uuid.uuid5(uuid.NAMESPACE_OID, stale.hex()).hex}"
    if not files.claim(right, b""):
        return False
    try:
        if files.get(_KEY, limit_bytes=_LIMIT_BYTES) != stale:
            return False
        files.put(_KEY, _content(token, 0))
    finally:
        files.delete(right)
    return True


def _renew(files: Files, token: str, over: threading.Event) -> None:
    count = 0
    while not over.wait(RENEWED_S):
        count += 1
        with suppress(StoreError):  # a cut network: the next time, or it is another's by then
            if _holder(files) != token:
                return
            files.put(_KEY, _content(token, count))


def _content(token: str, count: int) -> bytes:
    """Return what a lease says: other bytes at each renewal."""
    return json.dumps(
        {
            "token": token,
            "host": platform.node(),
            "where": WHERE,
            "pid": os.getpid(),
            "renewed": count,
        }
    ).encode()


def _is_of_the_dead(raw: bytes) -> bool:
    """Tell whether who has a lease was a process of this machine, and ended."""
    values = _values(raw)
    return is_gone(values.get("where"), values.get("pid"))


def _holder(files: Files) -> str | None:
    raw = files.get(_KEY, limit_bytes=_LIMIT_BYTES)
    return None if raw is None else str(_values(raw).get("token"))


def _said(raw: bytes) -> str:
    """Say who has a lease."""
    values = _values(raw)
    return f"process {values.get('pid', '?')} of {values.get('host', 'an unknown machine')}"


def _values(raw: bytes) -> dict[str, object]:
    with suppress(ValueError):
        values = json.loads(raw)
        if isinstance(values, dict):
            return values
    return {}
