"""``tilepipe export``: a result in the form that another program reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tilepipe.cli import options
from tilepipe.cli.masks import check_masks

if TYPE_CHECKING:
    from tilepipe.steps import Tell
    from tilepipe.store import Label, Store
    from tilepipe.tiling import Box

_SUFFIXES = {
    "geojson": ".geojson",
    "ome-tiff": ".ome.tif",
    "png": ".png",
    "csv": ".csv",
    "ome-zarr-0.4": "-0.4.zarr",
}

_ONLY_FOR = {
    "as_image": ("ome-tiff",),
    "classes": ("geojson", "csv"),
    "object_type": ("geojson",),
    "simplify": ("geojson",),
    "compression": ("ome-tiff",),
    **dict.fromkeys(("region", "longest_px", "show", "opacity", "outline"), ("png",)),
}


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    "form",
    type=click.Choice(list(_SUFFIXES)),
    required=True,
    help="Outlines for QuPath; tiled pyramid; picture; table of objects; OME-Zarr of Zarr v2.",
)
@click.option("-o", "--output", help="File (or folder) to write; default beside STORE.")
@click.option("--label", help="Label to export; needed where there are several.")
@click.option("--image", "as_image", is_flag=True, help="ome-tiff: the image, not the mask.")
@click.option(
    "--classes",
    multiple=True,
    help="geojson, csv: class names or ids to keep, with commas between, or the option once for "
    "each (for a name with a comma in it); of a label of objects, the numbers of the objects.",
)
@click.option(
    "--object-type",
    type=click.Choice(["annotation", "detection"]),
    default="annotation",
    show_default=True,
    help="geojson: what QuPath makes of it; detections are faster by the thousand.",
)
@click.option(
    "--simplify",
    type=click.FloatRange(min=0),
    default=0.0,
    help="geojson: px of the mask that outlines may move; 0 keeps them exact.",
)
@click.option(
    "--compression",
    type=click.Choice(["deflate", "lzw", "jpeg", "none"]),
    default="deflate",
    show_default=True,
    help="ome-tiff.",
)
@click.option("--region", help="png: Y0,X0,Y1,X1 in level-0 px.")
@click.option(
    "--size",
    "longest_px",
    type=click.IntRange(16, 32768),
    default=2048,
    show_default=True,
    help="png: longest side, px; the finest level that fits is drawn.",
)
@click.option(
    "--show",
    type=click.Choice(["overlay", "mask", "image"]),
    default="overlay",
    show_default=True,
    help="png.",
)
@click.option(
    "--opacity",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="png: of the mask.",
)
@click.option("--outline", is_flag=True, help="png: draw the mask's outlines.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is there.")
@options.json_option
@options.quiet_option
@options.debug_option
def command(store: str, form: str, output: str | None, **options_given: Any) -> None:
    """Write the mask (or image) of STORE in another form.

    GeoJSON has one feature per object, pixel-exact, joined across tile borders; a name ending in
    .geojson.gz is compressed.
    """
    _check_options(click.get_current_context(), form)
    from tilepipe.cli.steps import progress
    from tilepipe.errors import ExportError
    from tilepipe.export.sink import check_place
    from tilepipe.store import open_store

    opened = open_store(store)
    target = _default_output(store, _SUFFIXES[form]) if output is None else output
    if "://" in target and form != "ome-zarr-0.4":
        raise ExportError(f"{target}: only --to ome-zarr-0.4 can be written there; name a file")
    _check(opened, form, options_given)
    if form != "ome-zarr-0.4":  # which looks at more than that by itself
        check_place(opened, Path(target))
    with progress(store, quiet=options_given["quiet"], as_json=options_given["as_json"]) as tell:
        told = _WRITERS[form](opened, target, options_given, tell)
    if options_given["as_json"]:
        click.echo(json.dumps({"output": target, "to": form, **told}))
    elif not options_given["quiet"]:
        facts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in told.items())
        click.echo(f"{target}: {facts}")


def _check_options(context: click.Context, form: str) -> None:
    """Raise UsageError for an option of another form: left alone, all was exported for a region."""
    for option in context.command.params:
        forms = _ONLY_FOR.get(option.name or "", (form,))
        is_given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if form not in forms and is_given:
            wanted = " and ".join(f"--to {name}" for name in forms)
            raise click.UsageError(f"{option.opts[0]} is for {wanted}; leave it out of --to {form}")


def _check(store: Store, form: str, given: dict[str, Any]) -> None:
    draws_image = form == "png" and given["show"] != "mask"
    if form == "ome-zarr-0.4":
        named = store.labels if given["label"] is None else (given["label"],)
        labels = [store.label(name) for name in named]
    elif (form == "ome-tiff" and given["as_image"]) or (form == "png" and given["show"] == "image"):
        labels = []
    else:
        labels = [_label(store, given["label"])]
    for label in labels:
        label.check_placed()
    image = form == "ome-zarr-0.4" or draws_image or not labels
    check_masks(store, labels, image=image, quiet=given["quiet"])


def _default_output(store: str, suffix: str) -> str:
    stem = store.rstrip("/")
    for ending in (".ome.zarr", ".zarr"):
        stem = stem.removesuffix(ending)
    return stem.rsplit("/", 1)[-1] + suffix if "://" in stem else stem + suffix


def _label(store: Store, name: str | None) -> Label:
    from tilepipe.errors import ExportError

    if name is not None:
        return store.label(name)
    if len(store.masks) != 1:
        known = ", ".join(store.labels) or "none"
        raise ExportError(f"{store.location}: say which label with --label; there are: {known}")
    return store.label(store.masks[0])


def _kept(label: Label, texts: tuple[str, ...]) -> frozenset[int] | None:
    from tilepipe.errors import ExportError
    from tilepipe.export.figures import holds_instances

    if not texts:
        return None
    if holds_instances(label):
        return _numbers(label, ",".join(texts))
    # A label of others need not name every class it holds.
    open_ids = not label.read_record()
    by_name: dict[str, set[int]] = {}  # several classes may have one name
    for value, one in enumerate(label.classes):
        by_name.setdefault(one.name, set()).add(value)
    kept: set[int] = set()
    parts: list[str] = []
    for text in texts:  # a name may have commas: what is one as it stands is not taken apart
        parts += [text] if text.strip() in by_name else text.split(",")
    for part in (one.strip() for one in parts):
        if part in by_name:
            kept |= by_name[part]
        elif part.isdecimal() and (open_ids or int(part) < len(label.classes)):
            kept.add(int(part))
        else:
            known = ", ".join(f"{value} {one.name}" for value, one in enumerate(label.classes))
            raise ExportError(f"{label.name}: no class {part!r}; there are: {known}")
    return frozenset(kept)


def _numbers(label: Label, text: str) -> frozenset[int]:
    """Return the numbers of objects; a class keeps all of them or none, and was not meant."""
    from tilepipe.errors import ExportError

    parts = [one.strip() for one in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) == 0]:
        raise ExportError(
            f"{label.name}: holds objects, and {wrong[0]!r} is the number of none; give numbers "
            "from 1, or leave --classes out for all of them"
        )
    return frozenset(int(part) for part in parts)


def _geojson(store: Store, target: str, given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    from tilepipe.export import write_geojson
    from tilepipe.export.figures import holds_instances, um2_per_px
    from tilepipe.export.probability import probability_of

    label = _label(store, given["label"])
    level = label.level(0)
    count = write_geojson(
        Path(target),
        level,
        label.classes,
        scale=level.downsample,
        extent=store.extent,
        um2_per_px=um2_per_px(store, label),
        object_type=given["object_type"],
        tolerance_px=given["simplify"],
        only=_kept(label, given["classes"]),
        instances=holds_instances(label),
        probability=probability_of(store, label),
        overwrite=given["overwrite"],
        tell=tell,
    )
    return {"features": count}


def _csv(store: Store, target: str, given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    from tilepipe.export import write_csv
    from tilepipe.export.figures import holds_instances, um2_per_px
    from tilepipe.export.probability import probability_of

    label = _label(store, given["label"])
    level = label.level(0)
    count, totals = write_csv(
        Path(target),
        level,
        label.classes,
        scale=level.downsample,
        extent=store.extent,
        um2_per_px=um2_per_px(store, label),
        only=_kept(label, given["classes"]),
        instances=holds_instances(label),
        probability=probability_of(store, label),
        overwrite=given["overwrite"],
        tell=tell,
    )
    return {"objects": count, "totals": str(totals)}


def _ome_tiff(store: Store, target: str, given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    from tilepipe.export import write_ome_tiff

    name = None if given["as_image"] else _label(store, given["label"]).name
    levels = write_ome_tiff(
        Path(target),
        store,
        label=name,
        compression=given["compression"],
        overwrite=given["overwrite"],
        tell=tell,
    )
    return {"levels": levels}


def _png(store: Store, target: str, given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    del tell  # a picture is soon drawn, of whatever slide
    from tilepipe.export import render_view, write_png

    wants_mask = given["show"] != "image"
    picture = render_view(
        store,
        _label(store, given["label"]) if wants_mask else None,
        region=_region(given["region"]),
        longest_px=given["longest_px"],
        show=given["show"],
        opacity=given["opacity"],
        outline=given["outline"],
    )
    write_png(Path(target), picture, overwrite=given["overwrite"])
    return {"height_px": picture.shape[0], "width_px": picture.shape[1]}


def _region(text: str | None) -> Box | None:
    from tilepipe.errors import ExportError
    from tilepipe.tiling import Box

    if text is None:
        return None
    try:
        y0, x0, y1, x1 = (int(part) for part in text.split(","))
        return Box(y0, x0, y1, x1)
    except ValueError as error:
        raise ExportError(f"--region {text}: give Y0,X0,Y1,X1 in level-0 px") from error


def _ome_zarr(store: Store, target: str, given: dict[str, Any], tell: Tell) -> dict[str, Any]:
    from tilepipe.export import copy_store

    labels = None if given["label"] is None else [given["label"]]
    units = copy_store(store, target, labels=labels, overwrite=given["overwrite"], tell=tell)
    return {"write_units": units}


_WRITERS = {
    "geojson": _geojson,
    "ome-tiff": _ome_tiff,
    "png": _png,
    "csv": _csv,
    "ome-zarr-0.4": _ome_zarr,
}
