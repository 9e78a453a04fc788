"""The device engine: settings chosen and recorded, units computed, results verified."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilepipe.infer.account import Account, account_json, merge_seconds
    from tilepipe.infer.certify import Certificate, verify
    from tilepipe.infer.engine import Engine
    from tilepipe.infer.maps import UnitResult
    from tilepipe.infer.memory import (
        estimate_memory,
        forward_bytes,
    )
    from tilepipe.infer.settings import Settings, choose_settings
    from tilepipe.infer.tuning import estimate_seconds

_HOME = {
    "Account": "account",
    "account_json": "account",
    "merge_seconds": "account",
    "verify": "certify",
    "Certificate": "certify",
    "Engine": "engine",
    "UnitResult": "maps",
    "Settings": "settings",
    "choose_settings": "settings",
    "estimate_memory": "memory",
    "estimate_seconds": "tuning",
    "forward_bytes": "memory",
}

__all__ = [
    "Account",
    "Certificate",
    "Engine",
    "Settings",
    "UnitResult",
    "account_json",
    "choose_settings",
    "estimate_memory",
    "estimate_seconds",
    "forward_bytes",
    "merge_seconds",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its room when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tilepipe.infer.{_HOME[name]}"), name)
