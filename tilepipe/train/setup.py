"""From settings to the parts of a training: images, classes, device, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tilepipe.errors import TrainError
from tilepipe.infer.backends import gpu_count
from tilepipe.models import Normalisation
from tilepipe.models.registry import check_build
from tilepipe.spec import LabelClass, default_classes, resolved
from tilepipe.train.images import Pair, find_pairs, read_kinds, read_names, split
from tilepipe.train.spec import TrainSpec
from tilepipe.train.targets import BORDER_CLASSES, FOREGROUND_CLASSES


def gather(spec: TrainSpec) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Return the (training, validation) pairs of a spec; TrainError if one cannot be made."""
    kinds = read_kinds(spec.kinds) if spec.kinds else None
    pairs = find_pairs(spec.images, spec.labels, kinds=kinds)
    held: tuple[Pair, ...] = ()
    if spec.val is not None and spec.val_labels is not None:
        held = find_pairs(spec.val, spec.val_labels, kinds=kinds)
    _check_kinds(spec, (*pairs, *held))
    if spec.exclude is not None:
        left_out = set(read_names(spec.exclude))
        unknown = sorted(left_out - {pair.name for pair in (*pairs, *held)})
        if unknown:
            raise TrainError(
                f"{spec.exclude}: {len(unknown)} names are of no image, first {unknown[0]!r}; "
                "names are file names without suffix"
            )
        pairs = tuple(pair for pair in pairs if pair.name not in left_out)
        held = tuple(pair for pair in held if pair.name not in left_out)
    if spec.val is not None:
        return pairs, held
    return split(pairs, share=spec.val_share, seed=spec.seed)


def _check_kinds(spec: TrainSpec, pairs: Sequence[Pair]) -> None:
    """Raise TrainError for kinds that are of no image: they would have no say, without a word."""
    known = sorted({pair.kind for pair in pairs if pair.kind})
    if spec.kinds is not None and not known:
        raise TrainError(
            f"{spec.kinds}: its ids are of no image; ids are file names without suffix, such as "
            f"{pairs[0].name!r}"
        )
    unknown = sorted(set(spec.kind_weights) - {pair.kind for pair in pairs})
    if unknown:
        raise TrainError(
            f"kind_weights: no image is of kind {unknown[0]!r}; the kinds are "
            f"{', '.join(known) or 'none: give them with --kinds'}"
        )


def check_outputs(spec: TrainSpec, pairs: Sequence[Pair]) -> None:
    """Raise TrainError where a training would write over or among its input, or over no file."""
    inputs = {resolved(path) for pair in pairs for path in (pair.image, pair.labels)}
    inputs |= {resolved(path) for path in (spec.kinds, spec.exclude) if path is not None}
    for what, path in _outputs(spec):
        if resolved(path) in inputs:
            raise TrainError(
                f"{path}: the {what} would be written over this input; choose another -o"
            )
        if path.exists() and not path.is_file():
            raise TrainError(f"{path}: the {what} cannot be written: that is not a regular file")
    curve = curve_path(spec)
    for folder in (spec.images, spec.val):
        if folder is not None and resolved(curve.parent) == resolved(folder):
            raise TrainError(
                f"{curve}: the curve would lie among the images, and be taken for one when the "
                "training goes on; choose another -o"
            )


def check_nothing_there(spec: TrainSpec) -> None:
    """Raise TrainError where a new training would write over what another one, or anyone, made."""
    if state_path(spec).is_file():
        raise TrainError(
            f"{spec.out}: a training began there and did not end; --resume goes on with it, "
            "--overwrite begins anew in its place, another -o keeps both"
        )
    for what, path in _outputs(spec):
        if path.exists():
            raise TrainError(
                f"{path}: exists already, and the {what} would be written over it; choose another "
                "-o, or train anew in its place with --overwrite"
            )


def _outputs(spec: TrainSpec) -> Iterator[tuple[str, Path]]:
    """Yield what a training writes and where."""
    yield "weights", spec.out
    yield "log", log_path(spec)
    yield "curve", curve_path(spec)
    yield "state", state_path(spec)


def log_path(spec: TrainSpec) -> Path:
    """Return where the CSV log is written: beside the weights."""
    return spec.out.with_suffix(".csv")


def curve_path(spec: TrainSpec) -> Path:
    """Return where the PNG curve is written."""
    return spec.out.with_suffix(".png")


def state_path(spec: TrainSpec) -> Path:
    """Return where the state is written that ``--resume`` reads."""
    return spec.out.with_name(spec.out.name + ".state")


def choose_classes(spec: TrainSpec) -> tuple[LabelClass, ...]:
    """Return the classes of the mask; TrainError where names and count disagree."""
    if spec.target == "foreground+border":
        classes: tuple[LabelClass, ...] = BORDER_CLASSES
    elif spec.target == "foreground":
        classes = FOREGROUND_CLASSES
    else:
        count = spec.classes or (len(spec.class_names) or 2)
        classes = default_classes(max(2, count))
    if spec.classes not in (None, len(classes)) and not (spec.classes == 1 and len(classes) == 2):
        raise TrainError(
            f"target {spec.target} has {len(classes)} classes; {spec.classes} were asked for"
        )
    if spec.class_names:
        if len(spec.class_names) != len(classes):
            raise TrainError(
                f"{len(spec.class_names)} class names for {len(classes)} classes "
                "(the first is the background)"
            )
        if spec.target == "foreground+border" and spec.class_names[2].lower() != "border":
            raise TrainError(
                f"class name {spec.class_names[2]!r}: the third class of target foreground+border "
                "is called border; by that name `tilepipe run --instances` gives the rings to "
                "their cells"
            )
        classes = tuple(
            LabelClass(name=name, color=old.color)
            for name, old in zip(spec.class_names, classes, strict=True)
        )
    if spec.class_weights is not None and len(spec.class_weights) != len(classes):
        raise TrainError(f"{len(spec.class_weights)} class weights for {len(classes)} classes")
    return classes


def choose_arguments(spec: TrainSpec) -> dict[str, Any]:
    """Return base and options of the network; ModelError for what it cannot be built with."""
    arguments = dict(spec.options)
    if spec.base is not None:
        arguments["base"] = spec.base
    check_build(spec.model, in_channels=spec.in_channels or 1, classes=1, arguments=arguments)
    return arguments


def choose_normalisation(spec: TrainSpec, channels: int) -> Normalisation:
    """Return what the network sees of a pixel; ModelError for numbers that cannot be."""
    if not spec.mean and not spec.std:
        return Normalisation()
    normalisation = Normalisation("mean-std", spec.mean, spec.std)
    normalisation.check_channels(channels)
    return normalisation


def choose_device(name: str) -> torch.device:
    """Resolve ``auto``; TrainError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = gpu_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise TrainError(
                f"device {name}: torch sees {count or 'no'} CUDA devices here, numbered from 0; "
                "use one of them, or --device cpu"
            )
    return torch.device(name)


def fingerprint_of(
    spec: TrainSpec, data: str, *, training: Sequence[Pair], validation: Sequence[Pair]
) -> str:
    """Hash what shapes the trajectory: settings and data, not where files lie.

    Of data also who is learnt from and who is chosen by, and of which kind each is: kinds decide
    how often an image is drawn, how images are split and what the metric is the mean of.
    """
    values = spec.to_json()
    for key in ("images", "labels", "out", "val", "val_labels", "save_every_s", "kinds", "exclude"):
        values.pop(key)
    roles = [[[pair.name, pair.kind] for pair in pairs] for pairs in (training, validation)]
    text = json.dumps({"settings": values, "data": data, "roles": roles}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
