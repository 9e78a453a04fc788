"""``open_mask``: the label that a job's mask is written to, created or taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tilepipe.errors import MismatchError, StoreError
from tilepipe.pipeline.choice import Segmentation, asked
from tilepipe.pipeline.instances import forget_instances
from tilepipe.pipeline.job import fingerprint
from tilepipe.pipeline.output import is_begun, versions
from tilepipe.pipeline.source import Source, portable
from tilepipe.spec import JobSpec
from tilepipe.store import Store


def open_mask(
    source: Source,
    store: Store,
    spec: JobSpec,
    chosen: Segmentation,
    image_mark: str,
    *,
    sole: bool,
    check_turn: Callable[[], None],
) -> tuple[str, bool]:
    """Create the label or take up the one there; return its fingerprint, and whether it is new.

    ``sole``: no other process writes a part of it; ``check_turn`` raises StoreError where another
    machine has come to create it. Raises MismatchError if a label of that name is
    of another job, StoreError if it would be taken away under those that write parts of it: theirs
    would lie among the new units, of other weights perhaps, and count as done.
    """
    wanted = asked(spec, chosen.model, chosen.level)
    mark = fingerprint(image=image_mark, asked=wanted, settings=chosen.settings.to_json())
    name = chosen.name
    # Stopped between the label's creation and its first record: it begins anew.
    begun = name in store.labels and is_begun(store, name)
    if name in store.labels and not begun and (spec.part is not None or not spec.overwrite):
        record = store.label(name).read_record()
        if record.get("fingerprint") == mark:
            # A part makes its own units anew and takes away nothing: the rest is other parts' work.
            return mark, False
        if not spec.overwrite:
            then = record.get("asked")
            changed = _changed(then if isinstance(then, dict) else {}, wanted)
            raise MismatchError(
                f"{source.output}: the label {name!r} is of another job "
                f"({changed or 'the plan or the input differ'}); make it anew with --overwrite, or "
                "keep both with another --name"
            )
    if spec.overwrite and not sole:
        raise StoreError(
            f"{source.output}: another tilepipe process is writing a part of label {name} there, "
            "and --overwrite would take it away; wait for it or stop it"
        )
    check_turn()
    forget_instances(store, name)
    label = store.create_label(
        name,
        classes=chosen.model.classes,
        level=chosen.level,
        unit_px=chosen.settings.plan.unit_px,
        probabilities=spec.probabilities,
        overwrite=spec.overwrite or begun,
    )
    label.write_record(
        {
            "fingerprint": mark,
            "asked": wanted,
            # `finish` may be called in another folder.
            "spec": portable(spec).replace(overwrite=False, part=None).to_json(),
            "settings": chosen.settings.to_json(),
            "plan": chosen.settings.plan.to_json(),
            "model": {
                "name": chosen.model.name,
                "arguments": chosen.model.arguments,
                "sha256": chosen.model.sha256,
                "identity": chosen.model.identity,
                "source": chosen.model.source,
                "locality": chosen.model.locality.kind,
                "context_px": chosen.model.locality.context_px,
            },
            "in_store": source.store is not None,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "state": "running",
        }
    )
    return mark, True


def _changed(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Say which settings were others then, and which."""
    return ", ".join(
        f"{key} {_short(then.get(key))} then, {_short(now[key])} now"
        for key in sorted(now)
        if then.get(key) != now[key]
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 40 else text
