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
    width, height, left, base, tall = 420, 160, 54, 118, 100
    step = (width - left) / max(len(shown), 1)
    top = max(shown)
    fill = f"rgb({color[0]},{color[1]},{color[2]})"
    unit = "µm²" if um2_per_px is not None else "px"
    parts = [
        f'<text x="{left - 6}" y="{base - tall + 4}" text-anchor="end">{top:,}</text>',
        f'<text x="{left - 6}" y="{base + 4}" text-anchor="end">0</text>',
        f'<line x1="{left}" y1="{base - tall + 0.5}" x2="{width}" y2="{base - tall + 0.5}"/>',
    ]
    every = max(1, -(-len(shown) // 6))
    for index, count in enumerate(shown):
        # What is there is seen, however little beside the most frequent size.
        high = max(tall * count / top, 1.5) if count else 0.0
        x = left + index * step
        low, most = (_size(first + index + more, um2_per_px) for more in (0, 1))
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{base - high:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{high:.1f}" fill="{fill}" data-count="{count}">'
            f"<title>{count:,} objects of {low} to {most} {unit}</title></rect>"
        )
        # The last label would leave the chart if it were as far right as it could be.
        if index % every == 0 and x < width - 28:
            parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{low}</text>')
    parts.append(f'<line x1="{left}" y1="{base + 0.5}" x2="{width}" y2="{base + 0.5}"/>')
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
        f"area, {unit}</text>"
    )
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
        told = f"{value:.1f} %" if value >= 0.05 else "< 0.1 %"
        legend.append(
            f'<li><i style="background:{color}"></i>{label} '
            f'<b data-inspect="account.shares.{label}">{html.escape(told)}</b></li>'
        )
        x += wide
    return (
        '<svg class="bar" viewBox="0 0 800 26" preserveAspectRatio="none" role="img" '
        f'aria-label="Share of time per step">{"".join(bar)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
    )
