"""The verbs as Python calls: the same jobs as the command line's, with results to hold."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np

from tilepipe.errors import ScheduleError, StoreError
from tilepipe.export import Result
from tilepipe.pipeline.events import OnEvent, ignore
from tilepipe.pipeline.run import Request, run_one
from tilepipe.pipeline.stored import check_kept
from tilepipe.spec import JobSpec
from tilepipe.store import Store, open_store


def run(
    slide: str | Path,
    output: str | Path | None = None,
    *,
    on_event: OnEvent = ignore,
    **settings: Any,
) -> Result:
    """Segment a slide and return its mask; settings are those of ``tilepipe run``.

    ``output`` is the store; default the slide's name with ``.zarr`` in the current folder. A run
    that was stopped goes on when the same call is made again. A script that asks for ``workers``
    or ``gpus`` makes the call under ``if __name__ == "__main__":``, which each loads again.

    >>> result = tilepipe.run("slide.tif", model="unet")     # doctest: +SKIP
    >>> result.labels[0:1000, 0:1000]                        # doctest: +SKIP

    Raises the errors of ``tilepipe.errors``; UnitsFailedError if some units kept failing.
    """
    _check_caller()
    spec = JobSpec.checked({key: _plain(value) for key, value in settings.items()}, source="run")
    request = Request(str(slide), None if output is None else str(output), spec)
    result = run_one(request, on_event=on_event)
    assert result.label is not None
    return Result(result.output, result.label)


def ingest(
    slide: str | Path,
    output: str | Path | None = None,
    *,
    on_event: OnEvent = ignore,
    **settings: Any,
) -> Store:
    """Copy a slide into an OME-Zarr, bit for bit, and return the store."""
    _check_caller()
    spec = JobSpec.checked({key: _plain(value) for key, value in settings.items()}, source="ingest")
    request = Request(str(slide), None if output is None else str(output), spec)
    return open_store(run_one(request, segment=False, on_event=on_event).output)


def open_result(store: str | Path, label: str | None = None) -> Result:
    """Open a finished (or running) mask; ``label`` may be left out where there is one.

    Raises StoreError if files of the mask or of its image are gone, which would be read as 0.
    """
    opened = open_store(str(store))
    if label is None:
        names = opened.masks
        if not names:
            raise StoreError(f"{store}: holds no mask; make one with run, or `tilepipe run`")
        if len(names) != 1:
            raise StoreError(
                f"{store}: has {len(names)} labels ({', '.join(names)}); say which one"
            )
        label = names[0]
    result = Result(opened, label)
    check_kept(opened, [result.label])
    return result


def verify(store: str | Path, **settings: Any) -> Any:
    """Recompute places of a finished mask and compare; see ``tilepipe verify``."""
    from tilepipe.infer import verify as check

    return check(str(store), **{key: _plain(value) for key, value in settings.items()})


def _check_caller() -> None:
    """Raise ScheduleError in a worker process that is about to load the script of its user.

    Its call would be made once more there, and find that another process has the output.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ScheduleError(
            "a worker process loads the script that started it; make the call there under "
            "`if __name__ == '__main__':`"
        )


def _plain(value: Any) -> Any:
    """Return paths as text, and numpy's numbers and arrays as Python's own, in mappings too."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    return value
