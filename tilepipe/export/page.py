"""HTML of a report: text, numbers, lists of terms.

What a figure says is marked with where ``tilepipe inspect --json`` has it (``data-inspect``), so
that a test reads every one of them off the page (``tests/browser/test_report_page.py``).
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A line of a list: a term, its value as shown, and where ``inspect`` has that."""

    term: str
    value: Any
    key: str = ""
    unit: str = ""


def text(value: Any) -> str:
    """Escape for HTML."""
    return html.escape(str(value))


def count(value: int | None) -> str:
    """Whole number, grouped by thousands."""
    return "–" if value is None else f"{value:,}"


def number(value: float | None, digits: int) -> str:
    """Number of ``digits`` decimals."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Share of 1 as per cent."""
    return "–" if value is None else f"{value * 100:.2f} %"


def moment(value: Any) -> Any:
    """Date and time for reading: ``2026-01-02 03:04:05 UTC``."""
    if isinstance(value, str) and len(value) == 20 and value[10] == "T" and value.endswith("Z"):
        return f"{value[:10]} {value[11:19]} UTC"
    return value


def shown(value: Any, unit: str = "") -> str:
    """Return a value of a record as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        told = count(value)
    elif isinstance(value, float):
        told = f"{value:,.6g}"
    else:
        told = str(moment(value))
    return f"{told} {unit}" if unit else told


def marked(key: str, told: str, *, tag: str = "span") -> str:
    """Return an element that shows what ``inspect`` has at ``key``; ``told`` is escaped here."""
    mark = f' data-inspect="{text(key)}"' if key else ""
    return f"<{tag}{mark}>{text(told)}</{tag}>"


def terms(entries: Iterable[Entry]) -> str:
    """Return a list of terms; what is not known is left out."""
    rows = "".join(
        f"<dt>{text(one.term)}</dt>{marked(one.key, shown(one.value, one.unit), tag='dd')}"
        for one in entries
        if one.value not in (None, "")
    )
    return f"<dl>{rows}</dl>" if rows else "<p class=quiet>Not recorded.</p>"
