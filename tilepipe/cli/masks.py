"""What a command that hands a mask on, or shows it, looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tilepipe.store import Label, Store


def tell_lost(store: Store) -> None:
    """Say on stderr what lost files leave out, for a command that shows what is there."""
    from tilepipe.errors import TilepipeError
    from tilepipe.pipeline.stored import check_kept

    for labels in ((), *((store.label(name),) for name in store.labels)):
        try:
            check_kept(store, labels, image=not labels)
        except TilepipeError as error:
            click.echo(f"Warning: {error}", err=True)


def check_masks(store: Store, labels: Sequence[Label], *, image: bool, quiet: bool) -> None:
    """Refuse what lost files (``image``: of the image too); say on stderr what is not finished."""
    from tilepipe.pipeline.stored import check_kept, unfinished

    check_kept(store, labels, image=image)
    for reason in filter(None, map(unfinished, labels)):
        if not quiet:
            click.echo(f"Warning: {store.location}: {reason}", err=True)
