"""``tilepipe inspect``: what a slide, a store or a weights file holds."""

from __future__ import annotations

import json
from typing import Any

import click

from tilepipe.cli import options


@click.command("inspect")
@click.argument("path")
@click.option("--slide-mpp", type=float, help="µm/px of the slide, when its tags do not say.")
@options.json_option
@options.debug_option
def command(path: str, slide_mpp: float | None, as_json: bool) -> None:
    """Say what PATH holds: a slide, an OME-Zarr store, or weights (.safetensors)."""
    from tilepipe.pipeline.inspect import inspect

    facts = inspect(path, slide_mpp=slide_mpp)
    if as_json:
        click.echo(json.dumps(facts, default=str))
        return
    writer = {"slide": _slide, "store": _store, "weights": _weights}[facts["kind"]]
    click.echo("\n".join(writer(facts)))


def _mpp(mpp: Any) -> str:
    if mpp is None:
        return "unknown µm/px"
    x, y = f"{mpp[1]:.4g}", f"{mpp[0]:.4g}"
    return f"{x} µm/px" if x == y else f"{x} x {y} µm/px"


def _slide(facts: dict[str, Any]) -> list[str]:
    height, width = facts["extent"]
    lines = [
        f"{facts['path']}: {facts['format']}, {width} x {height} px, {facts['channels']} channels "
        f"({', '.join(facts['channel_names'])}), {facts['dtype']}",
        f"  {_mpp(facts['mpp'])}: {facts['mpp_source']}",
    ]
    for level in facts["levels"]:
        height, width = level["extent"]
        tile = (
            "x".join(str(side) for side in reversed(level["tile"])) if level["tile"] else "strips"
        )
        lines.append(
            f"  level {level['level']}: {width} x {height} px, downsample "
            f"{level['downsample'][1]:g}, {_mpp(level['mpp'])}, {tile}, {level['compression']}"
        )
    return [*lines, *(f"  note: {note}" for note in facts["notes"])]


def _units(units: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{name} {row['done']}/{row['total']} units" for name, row in units.items())


def _store(facts: dict[str, Any]) -> list[str]:
    height, width = facts["extent"]
    lines = [
        f"{facts['path']}: OME-Zarr {facts['ome_zarr']}, {width} x {height} px, "
        f"{facts['channels']} channels, {facts['dtype']}, {_mpp(facts['mpp'])}"
    ]
    image = facts["image"]
    if image is None:
        lines.append("  labels only; the image stayed in its slide")
    else:
        lines.append(f"  image: {len(image['levels'])} levels, {image['state']}"
                     f"; {_units(image['units'])}".rstrip("; "))  # fmt: skip
        lines += _damaged(image)
    for name, label in facts["labels"].items():
        if "classes" not in label:
            lines.append(f"  label {name}: {label['state']}: {label['reason']}")
            continue
        names = ", ".join(entry["name"] for entry in label["classes"])
        holds = f"classes {names or 'without names'}"
        if label["instances_of"]:
            known = "not yet counted" if label["count"] is None else str(label["count"])
            holds = f"objects of {label['instances_of']}: {known}"
        lines.append(f"  label {name}: {label['state']}; {len(label['levels'])} levels; {holds}")
        if label["units"]:
            lines.append(f"    {_units(label['units'])}")
        plan, model = label["plan"], label["model"]
        if plan and model:
            lines.append(
                f"    {model['name']} ({model['source']}), {plan['mode']} tiles of "
                f"{plan['input_px']} px, halo {plan['halo_px']} px, units of {plan['unit_px']} px"
            )
        total = sum((label["class_px"] or {}).values())
        if total:
            shares = (f"{k} {v / total:.2%}" for k, v in label["class_px"].items())
            lines.append(f"    {', '.join(shares)}")
        if label["probabilities"]:
            lines.append(f"    probabilities of {', '.join(label['probabilities']['channels'])}")
        if label["verified"]:
            lines.append(f"    verified {label['verified'].get('date', '')}")
        lines += [f"    failed: {entry['reason']}" for entry in label["failed"][:5]]
        lines += _damaged(label)
    return lines


def _damaged(facts: dict[str, Any]) -> list[str]:
    """Tiles of the slide that were filled: those that are named, and how many more there are."""
    lines = [f"    damaged: {tile}" for tile in facts["damaged"]]
    more = facts["n_damaged"] - len(lines)
    return [*lines, f"    damaged: {more} more"] if more > 0 else lines


def _weights(facts: dict[str, Any]) -> list[str]:
    names = ", ".join(entry["name"] for entry in facts["classes"])
    exact = "exact" if facts["exact"] else f"not exact: {facts['reason']}"
    return [
        f"{facts['path']}: {facts['architecture']} {facts['arguments'] or ''}".rstrip(),
        f"  {facts['in_channels']} channels in; classes {names}",
        f"  context {facts['context_px']} px, alignment {facts['alignment_px']} px, {exact}",
        f"  sha256 {facts['sha256'][:16]}, {facts['bytes'] / 1e6:.1f} MB",
    ]
