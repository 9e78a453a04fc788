"""The networks of a process: built once on a device, let go of when no open job uses them."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from tilepipe import malloc
from tilepipe.errors import ModelError
from tilepipe.pipeline.job import Ticket
from tilepipe.spec import JobSpec

if TYPE_CHECKING:
    from tilepipe.infer import Engine, Settings
    from tilepipe.models import Model

_MOST = 4
"""As many small jobs may be open at a time, each of another size."""
_engines: OrderedDict[str, Engine] = OrderedDict()
_loaded: WeakValueDictionary[str, Model] = WeakValueDictionary()
"""By what makes a network that and no other, and by what it was asked for.

Nobody changes one, and a job that is done holds it no more."""
_lock = threading.Lock()


def network_for(spec: JobSpec, channels: int) -> Model:
    """Load the network of a job on an image of so many channels, or return it if it is in use.

    Slides one after another have the same, and the units that are done in this process: to draw
    random weights takes seconds (2.2 at base 64), and a second copy the memory of the first.
    Raises what ``model_for`` does.
    """
    from tilepipe.models import model_for

    asked = repr((spec.model, spec.weights, spec.classes, spec.base, spec.options, channels,
                  _file_mark(spec.model), _file_mark(spec.weights)))  # fmt: skip
    model = _loaded.get(asked) or model_for(spec, image_channels=channels)
    _loaded[asked] = _loaded[model.identity] = model
    return model


def _file_mark(name: str | None) -> tuple[int, int, int] | None:
    """Return what tells a file of weights from another in its place; None: it names no file."""
    if name is None:
        return None
    try:
        facts = Path(name).stat()
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def network_key(spec: JobSpec, ticket: Ticket, device: str) -> str:
    """Return what tells a job's network on a device from others: equal keys share one."""
    return repr((spec.model, spec.weights, spec.classes, spec.base, spec.options,
                 ticket.in_channels, ticket.network, ticket.settings, spec.probabilities,
                 device))  # fmt: skip


def engine_of(
    key: str,
    spec: JobSpec,
    ticket: Ticket,
    settings: Settings,
    device: str,
    used: Callable[[], Container[str]],
) -> Engine:
    """Return the network of ``key`` on its device, built when it is first asked for.

    ``used`` tells the keys of open jobs: theirs are kept, or each would be built again.
    """
    with _lock:
        if key not in _engines:
            is_first = not _engines
            _make_room(used())
            _engines[key] = _build(spec, ticket, settings, device)
            if is_first:
                # torch leaves half a million objects that stay: no collection need look at them
                # again. Once: what has ended since then, and waits to be collected, would stay.
                gc.freeze()
        _engines.move_to_end(key)
        return _engines[key]


def _make_room(used: Container[str]) -> None:
    for key in [key for key in _engines if key not in used]:
        del _engines[key]
    while len(_engines) >= _MOST:
        _engines.popitem(last=False)


def _build(spec: JobSpec, ticket: Ticket, settings: Settings, device: str) -> Engine:
    from tilepipe.infer import Engine
    from tilepipe.models import load_model

    malloc.suit(settings.backend)
    model = _loaded.get(ticket.network) or load_model(
        spec.model,
        weights=spec.weights,
        in_channels=ticket.in_channels,
        classes=spec.classes,
        base=spec.base,
        options=spec.options,
    )
    if model.identity != ticket.network:
        raise ModelError(
            f"{spec.weights or spec.model}: is not the network here that the job was planned with: "
            "the file was changed, or is another one on this machine; put the same everywhere and "
            "give the command again"
        )
    return Engine(
        model,
        plan=settings.plan,
        device=device,
        precision=settings.precision,
        backend=settings.backend,
        batch=settings.batch,
        threads=settings.threads,
        cgm=settings.cgm if settings.cgm == "tile" else "off",
        probabilities=spec.probabilities,
        trims=settings.trims,
    )
