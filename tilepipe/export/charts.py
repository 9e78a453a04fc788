"""Two small charts as inline SVG: a size histogram and a bar of shares."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

_STEP_COLORS = (
    "#0c7f70",
    "#f0b429",
    "#5b7bd5",
    "#e5684b",
    "#8e6bbf",
    "#4aa3c7",
    "#b3803d",
    "#7a8f2f",
    "#d16d9e",
)


def histogram(counts: Sequence[int], color: Sequence[int], um2_per_px: float | None) -> str:
    """Bars of objects per size; bin k holds areas of 2**k up to 2**(k+1) - 1 px."""
    filled = [index for index, count in enumerate(counts) if count]
    if not filled:
        return ""
    first, last = filled[0], filled[-1]
    shown = counts[first : last + 1]
    width, height, left, base = 420, 150, 54, 120
    step = (width - left) / max(len(shown), 1)
    top = max(shown)
    fill = f"rgb({color[0]},{color[1]},{color[2]})"
    parts = [
        f'<text x="{left - 6}" y="18" text-anchor="end">{top:,}</text>',
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>',
        f'<line x1="{left}" y1="{base + 0.5}" x2="{width}" y2="{base + 0.5}"/>',
    ]
    every = max(1, -(-len(shown) // 6))
    for index, count in enumerate(shown):
        tall = 108 * count / top
        x = left + index * step
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{base - tall:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{tall:.1f}" fill="{fill}"><title>{count:,} objects of '
            f"{_size(first + index, um2_per_px)} and more</title></rect>"
        )
        if index % every == 0:
            parts.append(
                f'<text x="{x:.1f}" y="{base + 15}">{_size(first + index, um2_per_px)}</text>'
            )
    unit = "µm²" if um2_per_px is not None else "px"
    parts.append(f'<text x="{width}" y="{height - 2}" text-anchor="end">area, {unit}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Histogram of object areas">{"".join(parts)}</svg>'
    )


def _size(power: int, um2_per_px: float | None) -> str:
    area = (1 << power) * (um2_per_px if um2_per_px is not None else 1)
    return f"{area:,.0f}" if area >= 10 else f"{area:.2g}"


def shares(parts: Mapping[str, float]) -> str:
    """One bar cut by per cent, with its legend."""
    known = {name: float(value) for name, value in parts.items() if float(value) > 0}
    total = sum(known.values()) or 1.0
    x, bar, legend = 0.0, [], []
    for index, (name, value) in enumerate(known.items()):
        color = "#c9ced6" if name == "idle" else _STEP_COLORS[index % len(_STEP_COLORS)]
        wide = 800 * value / total
        label = html.escape(name)
        bar.append(
            f'<rect x="{x:.1f}" y="0" width="{wide:.1f}" height="26" fill="{color}">'
            f"<title>{label} {value:.1f} %</title></rect>"
        )
        legend.append(f'<li><i style="background:{color}"></i>{label} <b>{value:.1f} %</b></li>')
        x += wide
    return (
        '<svg class="bar" viewBox="0 0 800 26" preserveAspectRatio="none" role="img" '
        f'aria-label="Share of time per step">{"".join(bar)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
    )
