"""``Tell``: how work that may take long says where it stands; ``cli`` shows it."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int], None]
"""Told (what, done, total) in px of the step ``what``, whenever a piece of it is done."""


def ignore(what: str, done: int, total: int) -> None:
    """Listen to nothing."""


class Count:
    """Adds up the pieces of one step."""

    def __init__(self, tell: Tell, what: str, total_px: int) -> None:
        self._tell = tell
        self._what = what
        self._total_px = total_px
        self._done_px = 0

    def add(self, px: int) -> None:
        """Tell of ``px`` more."""
        self._done_px += px
        self._tell(self._what, self._done_px, self._total_px)
