"""What ``tilepipe run`` is asked to do: one request a slide, from arguments or a manifest."""

from __future__ import annotations

import csv
import glob
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilepipe.errors import SpecError
from tilepipe.spec import JobSpec

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
        # A pattern that the shell left alone (quoted, or on a system whose shell never expands).
        matches = sorted(glob.glob(slide)) if any(c in slide for c in "*?") else []  # noqa: PTH207
        found += matches or [slide]
    if not found:
        raise click.UsageError("which slide? tilepipe run SLIDE -o OUT.zarr")
    if len(found) == 1:
        return [Request(found[0], output, spec)]
    folder = Path(output or ".")
    requests = [Request(s, _join(output, folder, default_output(s)), spec) for s in found]
    _distinct(requests)
    return requests


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
    return list(Path(location).expanduser().resolve().parts)


def _from_manifest(path: Path, output: str | None, spec: JobSpec) -> list[Request]:
    from tilepipe.pipeline.run import Request
    from tilepipe.pipeline.source import default_output

    folder = Path(output or ".")
    requests = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise SpecError(f"{path}: holds a null byte; a manifest is text")
        rows = list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{path}: not a manifest that can be read: {error}") from error
    for number, row in enumerate(rows, start=2):
        slide = (row.get("slide") or "").strip()
        if not slide:
            raise SpecError(f"{path}: line {number}: no slide; the columns are slide, output, "
                            "mpp, label")  # fmt: skip
        changes: dict[str, Any] = {}
        if (row.get("mpp") or "").strip():
            try:
                changes["slide_mpp"] = float(str(row["mpp"]))
            except ValueError:
                raise SpecError(f"{path}: line {number}: mpp {row['mpp']!r} is no number") from None
        if (row.get("label") or "").strip():
            changes["name"] = str(row["label"]).strip()
        name = (row.get("output") or "").strip() or default_output(slide)
        if "://" not in name:
            target = Path(name)
            inside = (folder / target).resolve()
            if target.is_absolute() or not inside.is_relative_to(folder.resolve()):
                raise SpecError(
                    f"{path}: line {number}: output {name!r} leaves the output folder {folder}"
                )
            name = _join(output, folder, name)
        if not Path(slide).is_absolute() and "://" not in slide:
            slide = str(path.parent / slide)
        requests.append(Request(slide, name, spec.replace(**changes) if changes else spec))
    if not requests:
        raise SpecError(f"{path}: lists no slide")
    _distinct(requests)
    return requests
