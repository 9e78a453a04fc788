"""The same tilepipe on all workers: who has it, and tasks that another one refuses to run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilepipe.errors import ScheduleError
from tilepipe.packages import ABSENT, version_of

if TYPE_CHECKING:
    from distributed import Client

PACKAGE = "tilepipe"
REFUSALS = (ScheduleError, ImportError, AttributeError)
"""What a worker without tilepipe, or with another one, makes of a sealed task."""


def version_here() -> str | None:
    """Return the version of this process's tilepipe, as Dask finds that of a worker's."""
    version = version_of(PACKAGE)
    return None if version == ABSENT else version


@dataclass(frozen=True, slots=True)
class Sealed:
    """A call that runs where it is unpickled, if the same tilepipe is there.

    Dask is given its bytes and ``pickle.loads`` to run: a worker that cannot read a task otherwise
    ends, and the task ends the next one.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as the call: what it needs is read only after the versions were compared."""
        return run_sealed, (version_here(), pickle.dumps((self.function, self.arguments)))


def run_sealed(version: str | None, call: bytes) -> Any:
    """Run a sealed call on a worker; ScheduleError if it comes from another tilepipe."""
    here = version_here()
    if here != version:
        raise ScheduleError(
            f"a worker has tilepipe {here or 'of no version'}, the task comes from "
            f"{version or 'one of no version'}; install the same for all workers"
        )
    function, arguments = pickle.loads(call)
    return function(*arguments)


async def ask_versions(client: Client, workers: Collection[str]) -> dict[str, str | None]:
    """Return what tilepipe workers have: address -> version; of those that answer.

    Dask itself asks them, so that any worker can answer.
    """
    found = await client.scheduler.broadcast(
        msg={"op": "versions", "packages": [PACKAGE]}, workers=sorted(workers), on_error="ignore"
    )
    return {address: answer["packages"].get(PACKAGE) for address, answer in found.items() if answer}
