"""``write_report``: one self-contained HTML page about a result; it prints well."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tilepipe.errors import ExportError
from tilepipe.export.charts import histogram, shares
from tilepipe.export.figures import facts
from tilepipe.export.image import render_view, to_png
from tilepipe.export.sink import text_sink
from tilepipe.store import Store

_PICTURE_PX = 1400


def write_report(
    path: Path, store: Store, *, labels: Sequence[str] | None = None, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Write the page; returns the facts of each label in it. Raises ExportError."""
    names = store.labels if labels is None else tuple(labels)
    if not names:
        raise ExportError(f"{store.location}: no label to report; make one with: tilepipe run")
    told = []
    style = (files("tilepipe.export") / "report.css").read_text(encoding="utf-8")
    title = store.location.rstrip("/").rsplit("/", 1)[-1]
    with text_sink(path, overwrite=overwrite) as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,"><title>{_text(title)} · tilepipe report</title>\n'
            f"<style>\n{style}</style></head><body><main>\n"
            f"<header><h1>{_text(title)}</h1>{_slide_line(store)}</header>\n"
        )
        for name in names:
            known = facts(store, name)
            told.append(known)
            file.write(_label_section(store, known))
        file.write(f"<footer>{_versions(told)}</footer>\n</main></body></html>\n")
    return told


def _slide_line(store: Store) -> str:
    height, width = store.extent
    parts = [f"{width:,} × {height:,} px", f"OME-Zarr {store.version}"]
    if store.mpp is not None:
        y, x = store.mpp
        parts += [f"{x:.4g} µm/px", f"{width * x / 1e3:.2f} × {height * y / 1e3:.2f} mm"]
    slide = store.record.get("input") or {}
    source = slide.get("path") if isinstance(slide, dict) else None
    told = f"<p>from <code>{_text(source)}</code></p>" if source else ""
    return f"<p>{_text(' · '.join(parts))}</p>{told}"


def _label_section(store: Store, known: dict[str, Any]) -> str:
    label = store.label(known["label"])
    picture = render_view(
        store, label, longest_px=_PICTURE_PX, show="overlay" if store.has_image else "mask"
    )
    encoded = base64.b64encode(to_png(picture)).decode()
    state = known["state"] or "not recorded"
    return (
        f'<section data-label="{_text(known["label"])}"><h2>Mask “{_text(known["label"])}”'
        f'<span class="pill {"good" if state == "done" else ""}">{_text(state)}</span></h2>\n'
        f'<figure><img alt="The slide with the mask {_text(known["label"])} over it" '
        f'src="data:image/png;base64,{encoded}"></figure>\n'
        f"<h3>Classes</h3>{_classes(known)}\n"
        f"{_sizes(known)}\n"
        f'<div class="columns"><div><h3>Plan</h3>{_plan(known)}</div>'
        f"<div><h3>Certificate</h3>{_certificate(known)}</div></div>\n"
        f"{_account(known)}{_failed(known)}</section>\n"
    )


def _classes(known: dict[str, Any]) -> str:
    rows = []
    for one in known["classes"]:
        swatch = "#{:02x}{:02x}{:02x}".format(*one["color"])
        rows.append(
            f'<tr data-value="{one["value"]}" data-px="{one["px"]}"><td><i style="background:'
            f'{swatch}"></i>{_text(one["name"])}</td><td>{_count(one["px"])}</td>'
            f"<td>{_percent(one['share'])}</td><td>{_number(one['area_mm2'], 4)}</td>"
            f"<td>{_count(one['objects']) if one['value'] else '–'}</td>"
            f"<td>{_number(one['mean_object_um2'], 2)}</td></tr>"
        )
    return (
        "<table><thead><tr><th>Class</th><th>px</th><th>Share</th><th>Area, mm²</th>"
        "<th>Objects</th><th>Mean object, µm²</th></tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table>"
    )


def _sizes(known: dict[str, Any]) -> str:
    charts = [
        f"<figure><figcaption>{_text(one['name'])}: {_count(one['objects'])} objects</figcaption>"
        f"{histogram(one['size_histogram'], one['color'], _um2(known))}</figure>"
        for one in known["classes"]
        if one["value"] and one["objects"]
    ]
    return f'<h3>Object sizes</h3><div class="charts">{"".join(charts)}</div>' if charts else ""


def _um2(known: dict[str, Any]) -> float | None:
    if known["mpp"] is None:
        return None
    area: float = known["mpp"][0] * known["mpp"][1] * known["downsample"] ** 2
    return area


def _plan(known: dict[str, Any]) -> str:
    plan, model = known["plan"] or {}, known["model"] or {}
    settings = known["settings"] or {}
    return _list(
        {
            "Network": model.get("name"),
            "Weights": model.get("source"),
            "Weights, SHA-256": str(model.get("sha256", ""))[:16] or None,
            "Tiling": plan.get("mode"),
            "Tile core": _px(plan.get("core_px")),
            "Halo": _px(plan.get("halo_px")),
            "Context": _px(plan.get("context_px")),
            "Write unit": _px(plan.get("unit_px")),
            "Device": settings.get("device"),
            "Precision": settings.get("precision"),
            "Backend": settings.get("backend"),
            "Speed": f"{known['mpix_per_s']:.2f} MPix/s" if known["mpix_per_s"] else None,
            "Started": known["started"],
            "Finished": known["finished"],
        }
    )


def _certificate(known: dict[str, Any]) -> str:
    found = known["certificate"]
    if not isinstance(found, dict):
        return "<p class=quiet>None yet: <code>tilepipe verify</code> makes one.</p>"
    passed = found.get("passed")
    verdict = "passed" if passed else "not passed"
    pill = f'<p><span class="pill {"good" if passed else "bad"}">{verdict}</span></p>'
    shown = {
        key.replace("_", " "): value
        for key, value in found.items()
        if key not in ("passed", "label", "notes") and isinstance(value, str | int | float)
    }
    notes = found.get("notes")
    told = "".join(f"<p class=quiet>{_text(note)}</p>" for note in notes or [])
    return pill + _list(shown) + told


def _account(known: dict[str, Any]) -> str:
    account = known["account"]
    parts = account.get("shares") if isinstance(account, dict) else None
    if not isinstance(parts, dict) or not parts:
        return ""
    return (
        "<h3>Where the time went</h3>"
        f"<p class=quiet>{_number(account.get('wall_s'), 1)} s on {account.get('lanes', 1)} "
        f"threads</p>{shares(parts)}"
    )


def _failed(known: dict[str, Any]) -> str:
    failed = known["failed"]
    if not failed:
        return ""
    rows = "".join(
        f"<li>{_text(one.get('stage'))} {_text(one.get('box'))}: {_text(one.get('reason'))}</li>"
        for one in failed
        if isinstance(one, dict)
    )
    return f"<h3>Units that failed</h3><ul>{rows}</ul>"


def _versions(told: list[dict[str, Any]]) -> str:
    found = next((one["versions"] for one in told if one["versions"]), None)
    listed = ", ".join(f"{name} {value}" for name, value in (found or {}).items())
    return f"tilepipe report{': ' if listed else ''}{_text(listed)}"


def _list(rows: dict[str, Any]) -> str:
    shown = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(f'{value:.6g}' if type(value) is float else value)}</dd>"
        for name, value in rows.items()
        if value not in (None, "")
    )
    return f"<dl>{shown}</dl>" if shown else "<p class=quiet>Not recorded.</p>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _px(value: Any) -> str | None:
    return None if value is None else f"{value} px"


def _count(value: Any) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.2f} %"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
