"""``explained``: the operating system's errors as messages that say what to do."""

from __future__ import annotations

import errno
import re
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

_SERVERS_WORD = re.compile(
    r"<Error[ >].*?<Code>([^<]+)</Code>(?:\s*<Message>([^<]*)</Message>)?", re.DOTALL
)
_MOST_CHARACTERS = 300


def reason_of(error: Exception) -> str:
    """Return what an error says in one line: an S3 server's own word, else its first line.

    Servers begin their answer with a line that says only that it is XML, and obstore's first line
    may be a thousand keys long.
    """
    text = str(error).strip()
    if found := _SERVERS_WORD.search(text):
        code, message = found[1], " ".join((found[2] or "").split()).rstrip(".")
        return f"the server says {code}" + (f": {message[:_MOST_CHARACTERS]}" if message else "")
    return text.split("\n", 1)[0][:_MOST_CHARACTERS] or type(error).__name__


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
