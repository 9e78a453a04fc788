"""The locality probe: measures what an output pixel depends on, for any ``nn.Module``.

No formula and no gradient: NaN goes through convolution, pooling, ReLU and interpolation, so a
NaN strip at one edge of the input marks every output pixel that depends on it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.causes import named_in, watch
from tilepipe.models.legal import LegalSizes, find_legal_sizes, one_map
from tilepipe.models.locality import Locality
from tilepipe.models.net import InferenceNet, Net
from tilepipe.models.registry import architecture, build
from tilepipe.models.seeded import fill_seeded

_STRIP_PX = 64
"""Of NaN, and the widest shift that is tried; as wide as a legal step where that is wider."""
_WIDTH_PX = 16
_ODD_SHIFTS = (3, 5, 6, 7, 9, 10, 12, 18, 20, 24, 27, 28, 36, 40, 48, 56)
_TOLERANCE = 1e-9


def probe_architecture(name: str, options: Mapping[str, Any] | None = None) -> Locality:
    """Probe a registered architecture in a thin form: what it sees does not depend on width."""
    entry = architecture(name)
    arguments = {key: value for key, value in (options or {}).items() if key != "base"}
    net = build(name, in_channels=1, classes=2, base=entry.probe_base, **arguments)
    fill_seeded(net, 0)
    found = probe(net, in_channels=1)
    if found.kind == "local" and entry.fixed.get("cgm"):
        return replace(found, reason="the gate is a global maximum: exact in two passes")
    return found


def probe(module: nn.Module, *, in_channels: int, largest_px: int = 16384) -> Locality:
    """Measure context, alignment, legal sizes and kind of ``module``: (1, C, Y, X) -> logits.

    The module is copied; it runs in float64 on thin strips of up to ``largest_px``.
    Raises ModelError if it cannot be run or its output is not an image of the same scale.
    """
    form = module.inference() if isinstance(module, Net) else copy.deepcopy(module)
    form = form.double().eval().to("cpu")
    legal = (
        LegalSizes(form.least_px, form.step_px, form.margin_px)
        if isinstance(form, InferenceNet)
        else find_legal_sizes(form, in_channels)
    )
    strips = _Strips(form, in_channels, legal, largest_px)
    global_causes, never_causes = strips.causes()
    unknown = Locality(
        kind="local",
        reason="",
        context=(0, 0, 0, 0),
        reach_px=0,
        alignment_px=legal.step_px,
        margin_px=legal.margin_px,
        least_input_px=legal.least_px,
        input_step_px=legal.step_px,
    )
    context = strips.context(give_up=bool(global_causes))
    if context is None:
        cause = ", ".join(global_causes) or f"it sees more than {largest_px} px (cause unknown)"
        return replace(unknown, kind="global", reason=f"depends on the whole input: {cause}")
    found = replace(unknown, context=context, reach_px=max(context))
    alignment = strips.alignment(max(context))
    if alignment is None:
        cause = ", ".join(never_causes) or (
            f"its output does not repeat under any shift to {strips.widest_px} px"
        )
        return replace(found, kind="never", reason=f"position dependent: {cause}")
    found = replace(found, alignment_px=alignment)
    # With the alignment known, tile starts and ends are where tiles may be cut.
    return replace(found, reach_px=strips.reach(alignment, max(context)))


class _Strips:
    """Runs a module on strips: long along one axis, 16 px or little more along the other."""

    def __init__(
        self, form: nn.Module, in_channels: int, legal: LegalSizes, largest_px: int
    ) -> None:
        self.form = form
        self.channels = in_channels
        self.legal = legal
        self.largest_px = largest_px
        # A network of 7 poolings repeats itself every 128 px.
        self.widest_px = max(_STRIP_PX, legal.step_px)
        self.random = torch.Generator().manual_seed(0)

    def causes(self) -> tuple[list[str], list[str]]:
        """Watch one pass over a small input."""
        x = self.noise(self.legal.next_legal(_STRIP_PX), axis=2)
        try:
            return watch(self.form, x)
        except (RuntimeError, TypeError):
            # A network that cannot be watched on a strip (of other sizes, or in float64) is judged
            # by its layers' names; what it does to other sizes, the probe itself tells.
            return named_in(self.form), []

    def noise(self, rows: int, *, axis: int) -> Tensor:
        """(1, C, rows, 16 or more) float64, or transposed for axis 3."""
        x = torch.randn(
            1,
            self.channels,
            rows,
            self.legal.next_legal(_WIDTH_PX),
            dtype=torch.float64,
            generator=self.random,
        )
        return x if axis == 2 else x.transpose(2, 3).contiguous()

    def run(self, x: Tensor) -> Tensor:
        """One map of logits of ``x``."""
        with torch.no_grad():
            return one_map(self.form(x))

    def dirty(self, x: Tensor, *, axis: int) -> Tensor:
        """(B, rows) bool: which output rows (columns for axis 3) hold a NaN."""
        out = self.run(x)
        # (B, K, Y, X) -> (B, Y, X) -> what is left of the strip's long axis
        return torch.isnan(out).any(dim=1).any(dim=2 if axis == 2 else 1)

    def context(self, *, give_up: bool) -> tuple[int, int, int, int] | None:
        """Top, bottom, left, right; None if one edge still marks the other at ``largest_px``."""
        rows = 256
        while rows <= self.largest_px:
            found = self._context_at(self.legal.next_legal(rows))
            if found is not None:
                return found
            if give_up and rows >= 512:
                return None
            rows *= 2
        return None

    def _context_at(self, rows: int) -> tuple[int, int, int, int] | None:
        found: list[int] = []
        for axis in (2, 3):
            for measure in (self._before, self._after):
                px = measure(rows, axis, 0)
                if px is None:
                    return None
                found.append(px)
        return found[0], found[1], found[2], found[3]

    def _before(self, rows: int, axis: int, phase: int) -> int | None:
        """Context towards smaller indices: NaN in the first rows, up to a tile's start."""
        edge = self.widest_px + phase
        x = self.noise(rows, axis=axis)
        x.narrow(axis, 0, edge).fill_(float("nan"))
        marked = torch.nonzero(self.dirty(x, axis=axis)[0])
        if len(marked) == 0:
            return 0
        first_clean = int(marked[-1]) + 1
        if first_clean >= rows - 2 * self.legal.margin_px:
            return None
        return max(0, first_clean + self.legal.margin_px - edge)

    def _after(self, rows: int, axis: int, phase: int) -> int | None:
        """Context towards larger indices: NaN in the last rows, from a legal tile's end on."""
        edge = self.legal.next_legal(rows - self.widest_px - self.legal.step_px) - phase
        x = self.noise(rows, axis=axis)
        x.narrow(axis, edge, rows - edge).fill_(float("nan"))
        marked = torch.nonzero(self.dirty(x, axis=axis)[0])
        if len(marked) == 0:
            return 0
        first_dirty = int(marked[0])
        if first_dirty == 0:
            return None
        return max(0, edge - 1 - (first_dirty - 1 + self.legal.margin_px))

    def reach(self, alignment: int, context: int) -> int:
        """Return the largest context over all phases of the cut, along y.

        The marked border is a staircase in the phase: where two phases share a border, so do
        those between them, and the context is worst where a step begins.
        """
        # What a valid network consumes has to be there beside what is measured.
        rows = self.legal.next_legal(
            2 * (self.widest_px + alignment + self.legal.margin_px) + context + 64
        )
        worst = context
        for measure in (self._before, self._after):
            pending = [(0, alignment)]
            known = {0: measure(rows, 2, 0)}
            known[alignment] = known[0]  # one whole turn of the phase
            while pending:
                low, high = pending.pop()
                below, above = known[low], known[high]
                if below is None or above is None:
                    return worst
                worst = max(worst, below, above)
                if high - low > 1 and below - above != high - low:
                    middle = (low + high) // 2
                    known[middle] = measure(rows, 2, middle)
                    pending += [(low, middle), (middle, high)]
        return worst

    def alignment(self, context: int) -> int | None:
        """Smallest shift under which the output repeats itself, along both axes; else None."""
        margin = self.legal.margin_px
        # Past the alignment's own phase, what differs near the ends is at most the context away.
        edge = max(0, context - margin) + 2 * self.widest_px
        rows = self.legal.next_legal(2 * (edge + margin) + 2 * self.widest_px)
        pairs: list[tuple[int, Tensor, Tensor]] = []
        for axis in (2, 3):
            x = self.noise(rows + self.widest_px, axis=axis)
            pairs.append((axis, x, self.run(x.narrow(axis, 0, rows).contiguous())))
        if any(float(out.std()) == 0.0 for _, _, out in pairs):
            raise ModelError("its output is constant on noise, so its alignment cannot be seen")

        def repeats(shift: int) -> bool:
            for axis, x, out in pairs:
                moved = self.run(x.narrow(axis, shift, rows).contiguous())
                length = out.shape[axis] - 2 * edge - shift
                here = out.narrow(axis, edge + shift, length)
                there = moved.narrow(axis, edge, length)
                scale = max(1e-30, float(here.abs().max()))
                if float((here - there).abs().max()) > _TOLERANCE * scale:
                    return False
            return True

        doubled = (1 << power for power in range(self.widest_px.bit_length()))
        return next((shift for shift in (*doubled, *_ODD_SHIFTS) if repeats(shift)), None)
