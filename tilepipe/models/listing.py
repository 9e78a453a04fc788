"""What ``tilepipe models`` lists: facts of every registered architecture, quick to find out."""

from __future__ import annotations

from typing import Any

from tilepipe.models.model import WEIGHTS, locality_of
from tilepipe.models.registry import ARCHITECTURES, option_names, parameters_of


def list_models() -> list[dict[str, Any]]:
    """Return one object per architecture with its default options.

    ``parameters`` at 3 channels and 2 classes, full width. ``context_px`` and ``alignment_px``
    are the probe's; both are what a tile needs where ``exact``, and for never-exact networks the
    context is null: it depends on the place.
    """
    rows = []
    for name, entry in ARCHITECTURES.items():
        locality = locality_of(name, {})
        rows.append(
            {
                "name": name,
                "paper": entry.paper,
                "parameters": parameters_of(name),
                "paper_parameters": entry.paper_parameters,
                "base": entry.default_base,
                "context_px": locality.context_px if locality.exact else None,
                "halo_px": locality.halo_px if locality.exact else None,
                "alignment_px": locality.alignment_px,
                "least_input_px": locality.least_input_px,
                "input_step_px": locality.input_step_px,
                "exact": locality.exact,
                "kind": locality.kind,
                "reason": entry.exactness,
                "options": list(option_names(name)),
                "bundled": (WEIGHTS / f"{name}.safetensors").is_file(),
            }
        )
    return rows
