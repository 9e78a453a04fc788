"""``explained``: the operating system's errors as messages that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from tilepipe.errors import StoreError, TilepipeError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, "
    "what is done is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, "
    "what is done is kept",
    errno.EACCES: "choose another output folder or change its permissions",
    errno.EPERM: "choose another output folder or change its permissions",
    errno.EROFS: "the file system is mounted read-only; choose another output folder",
    errno.EEXIST: "something else has that name; choose another output folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output folder",
    errno.EIO: "the disk reports an error; check it, then run the same command again",
    errno.EMFILE: "too many files are open; raise `ulimit -n` or use fewer workers",
}


@contextmanager
def explained(location: str, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into a StoreError that says what to do."""
    try:
        yield
    except TilepipeError:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        message = f"{location}: cannot {doing}: {error.strerror or error}"
        translated = StoreError(f"{message}; {advice}" if advice else message)
        translated.errno = error.errno
        raise translated from error
