"""``write_report``: one self-contained HTML page about a result; it prints well."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tilepipe.errors import ExportError
from tilepipe.export.charts import histogram, shares
from tilepipe.export.detail import busiest
from tilepipe.export.figures import facts
from tilepipe.export.image import UInt8, render_view, to_png
from tilepipe.export.page import Entry, count, marked, number, percent, shown, terms, text
from tilepipe.export.sink import check_place, text_sink
from tilepipe.steps import Tell, ignore
from tilepipe.store import Label, Store

_PICTURE_PX = 1400
_DETAIL_PX = 320


def write_report(
    path: Path,
    store: Store,
    *,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    tell: Tell = ignore,
) -> list[dict[str, Any]]:
    """Write the page; returns the facts of each label in it. Raises ExportError."""
    names = store.labels if labels is None else tuple(labels)
    if not names:
        raise ExportError(f"{store.location}: no label to report; make one with: tilepipe run")
    check_place(store, path)
    for name in names:
        store.label(name).check_placed()
    told = []
    style = (files("tilepipe.export") / "report.css").read_text(encoding="utf-8")
    title = store.location.rstrip("/").rsplit("/", 1)[-1]
    with text_sink(path, overwrite=overwrite) as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,"><title>{text(title)} · tilepipe report</title>\n'
            f"<style>\n{style}</style></head><body><main>\n"
            f"<header><h1>{text(title)}</h1>{_slide_line(store)}</header>\n"
        )
        for name in names:
            known = facts(store, name, tell=tell)
            told.append(known)
            file.write(_label_section(store, known))
        file.write("<footer>tilepipe report</footer>\n</main></body></html>\n")
    return told


def _slide_line(store: Store) -> str:
    height, width = store.extent
    parts = [
        f"{marked('extent.1', count(width))} × {marked('extent.0', count(height))} px",
        f"OME-Zarr {marked('ome_zarr', store.version)}",
    ]
    if store.mpp is not None:
        y, x = store.mpp
        parts += [
            f"{marked('mpp.1', f'{x:.4g}')} µm/px",
            f"{width * x / 1e3:.2f} × {height * y / 1e3:.2f} mm",
        ]
    source = store.read_record().get("source")
    slide = source.get("path") if isinstance(source, dict) else None
    told = f"<p>from <code>{marked('source.path', slide)}</code></p>" if slide else ""
    return f"<p>{' · '.join(parts)}</p>{told}"


def _label_section(store: Store, known: dict[str, Any]) -> str:
    label = store.label(known["label"])
    state = known["state"] or "not recorded"
    kind = "Objects" if known["instances"] else "Mask"
    return (
        f'<section data-label="{text(known["label"])}"><h2>{kind} “{text(known["label"])}”'
        f'<span class="pill {"good" if state == "done" else ""}" data-inspect="state">'
        f"{text(state)}</span></h2>\n"
        f"{_overview(store, label)}\n"
        f"<h3>Classes</h3>{_classes(known)}\n"
        f"{_detail(store, label)}\n"
        f"{_sizes(known)}\n"
        f'<div class="columns"><div><h3>Plan</h3>{_plan(known)}</div>'
        f"<div><h3>Certificate</h3>{_certificate(known)}</div></div>\n"
        f"{_account(known)}{_failed(known)}{_versions(known)}</section>\n"
    )


def _figure(picture: UInt8, alt: str, caption: str = "") -> str:
    encoded = base64.b64encode(to_png(picture)).decode()
    height, width = picture.shape[:2]
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{text(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{encoded}">{below}</figure>'
    )


def _overview(store: Store, label: Label) -> str:
    picture = render_view(
        store, label, longest_px=_PICTURE_PX, show="overlay" if store.has_image else "mask"
    )
    alt = f"The slide with the mask {label.name} over it"
    return f'<div class="overview">{_figure(picture, alt)}</div>'


def _detail(store: Store, label: Label) -> str:
    """Return a place at full resolution without and with the outlines of the mask.

    Empty where the overview shows everything already.
    """
    if max(store.extent) <= _PICTURE_PX:
        return ""
    box = busiest(label, store.extent, side_px=_DETAIL_PX)
    side = f"{box.shape[1]} × {box.shape[0]} px"
    if store.mpp is not None:
        y, x = store.mpp
        side += f", {box.shape[1] * x:.4g} × {box.shape[0] * y:.4g} µm"
    figures = []
    if store.has_image:
        plain = render_view(store, label, region=box, longest_px=_DETAIL_PX, show="image")
        figures.append(_figure(plain, "A part of the slide at full resolution", "The slide"))
    drawn = render_view(
        store,
        label,
        region=box,
        longest_px=_DETAIL_PX,
        show="overlay" if store.has_image else "mask",
        opacity=1.0,
        outline=store.has_image,
    )
    caption = "The outlines of the mask" if store.has_image else "The mask"
    figures.append(_figure(drawn, f"The same part with the mask {label.name}", caption))
    return (
        f"<div class=whole><h3>Where most is found</h3><p class=quiet>{text(side)} from "
        f"y {box.y0:,}, x {box.x0:,}, at full resolution</p>"
        f'<div class="detail">{"".join(figures)}</div></div>'
    )


def _classes(known: dict[str, Any]) -> str:
    rows = []
    for one in known["classes"]:
        swatch = "#{:02x}{:02x}{:02x}".format(*one["color"])
        look = f'style="background:{swatch}"' if one["value"] else "class=none"
        cells = {
            "px": count(one["px"]),
            "Share": percent(one["share"]),
            "Area, mm²": number(one["area_mm2"], 4),
            "Objects": count(one["objects"]) if one["value"] else "–",
            "Mean, µm²": number(one["mean_object_um2"], 2),
        }
        rows.append(
            f'<tr data-value="{one["value"]}" data-px="{one["px"]}">'
            f'<th scope="row"><i {look}></i>{text(one["name"])}</th>'
            + "".join(f'<td data-name="{name}">{told}</td>' for name, told in cells.items())
            + "</tr>"
        )
    return (
        '<table><thead><tr><th scope="col">Class</th><th scope="col">px</th>'
        '<th scope="col">Share</th><th scope="col">Area, mm²</th><th scope="col">Objects</th>'
        '<th scope="col">Mean object, µm²</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _sizes(known: dict[str, Any]) -> str:
    charts = [
        f"<figure><figcaption>{text(one['name'])}: {count(one['objects'])} objects</figcaption>"
        f"{histogram(one['size_histogram'], one['color'], _um2(known))}</figure>"
        for one in known["classes"]
        if one["value"] and one["objects"]
    ]
    if not charts:
        return ""
    return (
        f'<div class=whole><h3>Object sizes</h3><div class="charts">{"".join(charts)}</div></div>'
    )


def _um2(known: dict[str, Any]) -> float | None:
    if known["mpp"] is None:
        return None
    area: float = known["mpp"][0] * known["mpp"][1] * known["downsample"] ** 2
    return area


def _plan(known: dict[str, Any]) -> str:
    plan, model = known["plan"] or {}, known["model"] or {}
    settings, rule = known["settings"] or {}, known["rule"] or {}
    weights = str(model.get("sha256", ""))[:16]
    speed = known["mpix_per_s"]
    return terms(
        [
            Entry("Network", model.get("name"), "model.name"),
            Entry("Weights", model.get("source"), "model.source"),
            Entry("Weights, SHA-256", weights and f"{weights}…", "model.sha256"),
            Entry("Tiling", plan.get("mode"), "plan.mode"),
            Entry("Tile core", plan.get("core_px"), "plan.core_px", "px"),
            Entry("Halo", plan.get("halo_px"), "plan.halo_px", "px"),
            Entry("Context", plan.get("context_px"), "plan.context_px", "px"),
            Entry("Write unit", plan.get("unit_px"), "plan.unit_px", "px"),
            Entry("Device", settings.get("device"), "settings.device"),
            Entry("Precision", settings.get("precision"), "settings.precision"),
            Entry("Backend", settings.get("backend"), "settings.backend"),
            Entry("Objects of", known["instances_of"], "instances_of"),
            Entry("Objects", known["count"], "count"),
            Entry("Rule", rule.get("text"), "rule.text"),
            Entry("Speed", f"{speed:.2f}" if speed else None, "mpix_per_s", "MPix/s"),
            Entry("Started", known["started"], "started"),
            Entry("Finished", known["finished"], "finished"),
        ]
    )


_CERTIFICATE_TERMS = {
    "date": "Date",
    "samples": "Places computed again",
    "sampled_px": "Pixels computed again",
    "flips": "Pixels that differ",
    "flip_share": "Share that differs",
    "flips_allowed": "Share that may differ",
    "ties": "Ties",
    "max_probability_error": "Largest error of a probability",
    "precision": "Precision of the mask",
    "label_units": "Units of the mask read back",
    "probability_units": "Units of the probabilities read back",
    "probability_off": "Largest difference of a stored probability, of 255",
    "image_units": "Units of the image read back",
    "slide": "Slide compared with",
    "slide_units": "Units equal to the slide",
    "seconds": "Took",
}


def _certificate(known: dict[str, Any]) -> str:
    found = known["certificate"]
    if not isinstance(found, dict):
        return "<p class=quiet>None yet: <code>tilepipe verify</code> makes one.</p>"
    passed = found.get("passed")
    verdict = "passed" if passed else "not passed"
    pill = f'<p><span class="pill {"good" if passed else "bad"}">{verdict}</span></p>'
    told = {key: value for key, value in found.items() if isinstance(value, str | int | float)}
    rest = [key for key in told if key not in (*_CERTIFICATE_TERMS, "passed", "label")]
    listed = terms(
        Entry(
            _CERTIFICATE_TERMS.get(key, key.replace("_", " ")),
            told.get(key),
            f"verified.{key}",
            "s" if key == "seconds" else "",
        )
        for key in (*_CERTIFICATE_TERMS, *rest)
    )
    notes = "".join(f"<p class=quiet>{text(note)}</p>" for note in found.get("notes") or [])
    return pill + listed + notes


def _account(known: dict[str, Any]) -> str:
    account = known["account"]
    parts = account.get("shares") if isinstance(account, dict) else None
    if not isinstance(parts, dict) or not parts:
        return ""
    wall = marked("account.wall_s", number(account.get("wall_s"), 1))
    lanes = marked("account.lanes", shown(account.get("lanes", 1)))
    return (
        "<div class=whole><h3>Where the time went</h3>"
        f"<p class=quiet>{wall} s of the last run, on {lanes} threads</p>{shares(parts)}</div>"
    )


def _failed(known: dict[str, Any]) -> str:
    failed = known["failed"]
    if not failed:
        return ""
    rows = "".join(
        f"<li>{text(one.get('stage'))} {text(one.get('box'))}: {text(one.get('reason'))}</li>"
        for one in failed
        if isinstance(one, dict)
    )
    return f"<h3>Units that failed</h3><ul>{rows}</ul>"


def _versions(known: dict[str, Any]) -> str:
    found = known["versions"]
    if not isinstance(found, dict) or not found:
        return ""
    listed = (
        f"{text(name)} {marked(f'versions.{name}', str(value))}" for name, value in found.items()
    )
    return f'<p class="quiet made">Made with {", ".join(listed)}</p>'
