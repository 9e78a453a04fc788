"""The networks of a process: built once on a device, let go of when no open job uses them."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Container
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
"""By what makes a network that and no other."""
_lock = threading.Lock()


def share(model: Model) -> None:
    """Let the units that are done in this process use the network that their job was planned with.

    Drawing random weights takes seconds (2.2 at base 64), in which a device would have nothing to
    do, and a second copy the memory of the first.
    """
    _loaded[model.identity] = model


def network_key(ticket: Ticket, device: str) -> str:
    """Return what tells a job's network on a device from others: equal keys share one."""
    spec = JobSpec.checked(ticket.spec, source="ticket")
    return repr((spec.model, spec.weights, spec.classes, spec.base, spec.options,
                 ticket.in_channels, ticket.network, ticket.settings, spec.probabilities,
                 device))  # fmt: skip


def engine_of(
    key: str, ticket: Ticket, settings: Settings, device: str, used: Callable[[], Container[str]]
) -> Engine:
    """Return the network of ``key`` on its device, built when it is first asked for.

    ``used`` tells the keys of open jobs: theirs are kept, or each would be built again.
    """
    with _lock:
        if key not in _engines:
            is_first = not _engines
            _make_room(used())
            _engines[key] = _build(ticket, settings, device)
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


def _build(ticket: Ticket, settings: Settings, device: str) -> Engine:
    from tilepipe.infer import Engine
    from tilepipe.models import load_model

    malloc.suit(settings.backend)
    spec = JobSpec.checked(ticket.spec, source="ticket")
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
