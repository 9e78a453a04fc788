"""What ``tilepipe run`` is asked to do: one request a slide, from arguments or a manifest."""

from __future__ import annotations

import csv
import glob
import io
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilepipe.errors import SpecError
from tilepipe.spec import JobSpec, at_home, is_path, resolved

if TYPE_CHECKING:
    from tilepipe.pipeline.run import Request


def requests_of(
    slides: tuple[str, ...], output: str | None, manifest: str | None, spec: JobSpec
) -> list[Request]:
    """One request a slide; SpecError where outputs would collide."""
    from tilepipe.pipeline.run import Request
    from tilepipe.pipeline.source import default_output

    if manifest is not None:
        if slides:
            raise click.UsageError("give SLIDE... or --manifest, not both")
        return _from_manifest(Path(manifest), output, spec)
    found: list[str] = []
    for slide in slides:
        found += _matching(slide) or [slide]
    if not found:
        raise click.UsageError("which slide? tilepipe run SLIDE -o OUT.zarr")
    if len(found) == 1:
        return [Request(found[0], output, spec)]
    folder = Path(output or ".")
    requests = [
        Request(s, s if _stays(s, output) else _join(output, folder, default_output(s)), spec)
        for s in found
    ]
    _distinct(requests)
    return requests


def _matching(slide: str) -> list[str]:
    """Return what a pattern stands for, if it is one that the shell left alone.

    It was quoted, or no shell expands any. A file's own name may hold the same characters.
    """
    if not any(c in slide for c in "*?") or os.path.lexists(slide):
        return []
    return sorted(glob.glob(slide))  # noqa: PTH207


def status_name(spec: JobSpec) -> str:
    """Return what the table of all slides is called; each part of a job array has its own."""
    if spec.part is None:
        return "status.csv"
    share, _, total = spec.part.partition("/")
    return f"status-{share}-of-{total}.csv"


def _stays(slide: str, output: str | None) -> bool:
    """Tell whether a slide is segmented where it lies: an OME-Zarr, if no folder is named."""
    from tilepipe.slide.zarr_input import is_zarr

    # Of what is not on this machine nothing else is read.
    is_store = "://" in slide or (is_path(slide) and is_zarr(Path(at_home(slide))))
    return output is None and is_store


def _join(output: str | None, folder: Path, name: str) -> str:
    if output is not None and "://" in output:
        return f"{output.rstrip('/')}/{name}"
    return str(folder / name)


def _distinct(requests: list[Request]) -> None:
    """Raise SpecError where two outputs are one, or one lies in another."""
    from tilepipe.store import overlap

    # In this order what lies inside a place follows it.
    for one, other in pairwise(sorted(requests, key=lambda request: _place(str(request.output)))):
        if overlap(str(one.output), str(other.output)):
            raise SpecError(
                f"{one.slide} and {other.slide} would both be written to {one.output}"
                + ("" if one.output == other.output else f" ({other.output})")
                + "; name the outputs in a --manifest, none inside another"
            )


def _place(location: str) -> list[str]:
    """Return the folders that lead to a location, however it is spelled."""
    if "://" in location:
        return location.rstrip("/").split("/")
    return list(resolved(at_home(location)).parts)


def _from_manifest(path: Path, output: str | None, spec: JobSpec) -> list[Request]:
    from tilepipe.pipeline.run import Request
    from tilepipe.pipeline.source import default_output

    folder = Path(output or ".")
    requests = []
    for number, row in _rows(path):
        slide = row.get("slide", "")
        if not slide:
            raise SpecError(f"{path}: line {number}: no slide; {_COLUMNS}")
        changes: dict[str, Any] = {}
        if row.get("mpp"):
            try:
                changes["slide_mpp"] = float(row["mpp"])
            except ValueError:
                raise SpecError(f"{path}: line {number}: mpp {row['mpp']!r} is no number") from None
        if row.get("label"):
            changes["name"] = row["label"]
        slide = at_home(slide)
        if not Path(slide).is_absolute() and "://" not in slide:
            slide = str(path.parent / slide)
        name = at_home(row.get("output", ""))
        if not name and _stays(slide, output):
            name = slide
        elif "://" not in (name := name or default_output(slide)):
            target = Path(name)
            inside = resolved(folder / target)
            if target.is_absolute() or not inside.is_relative_to(resolved(folder)):
                raise SpecError(
                    f"{path}: line {number}: output {name!r} leaves the output folder {folder}"
                )
            if inside in (resolved(folder), resolved(folder) / status_name(spec)):
                raise SpecError(
                    f"{path}: line {number}: output {name!r} is where the table of all slides "
                    "goes; give it another name"
                )
            name = _join(output, folder, name)
        try:
            requests.append(Request(slide, name, spec.replace(**changes) if changes else spec))
        except SpecError as error:
            raise SpecError(f"{path}: line {number}: {error}") from error
    if not requests:
        raise SpecError(f"{path}: lists no slide")
    _distinct(requests)
    return requests


_COLUMNS = "the columns are slide, output, mpp, label"


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return each row of a manifest with the line it ends on; SpecError for columns unknown.

    A column that nobody reads would leave a slide with another µm/px or name than was meant.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise SpecError(f"{path}: holds a null byte; a manifest is text")
        # A quote that nobody closes would take the rest of the manifest for one cell.
        reader = csv.reader(io.StringIO(text), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise SpecError(
            f"{path}: line {reader.line_num}: {error}; quotes stand around a whole cell, and one "
            "inside it is written twice"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a manifest that can be read: {error}") from error
    if not lines:
        raise SpecError(f"{path}: lists no slide")
    names = [name.lower() for name in lines[0][1]]
    while names and not names[-1]:  # Spreadsheets end their lines with commas.
        del names[-1]
    for name in names:
        if name not in ("slide", "output", "mpp", "label"):
            raise SpecError(f"{path}: no column is called {name[:80]!r}; {_COLUMNS}")
        if names.count(name) > 1:
            raise SpecError(f"{path}: two columns are called {name!r}")
    for number, row in lines[1:]:
        if any(row[len(names) :]):
            raise SpecError(f"{path}: line {number}: more cells than columns ({len(names)})")
    return [(number, dict(zip(names, row, strict=False))) for number, row in lines[1:]]
