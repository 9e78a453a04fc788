"""What a finished mask was made with: settings, network and pixels, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from tilepipe.errors import TilepipeError, VerifyError
from tilepipe.infer.settings import Settings
from tilepipe.models import Model, model_for
from tilepipe.slide import Read, Slide, reads_shown
from tilepipe.spec import JobSpec
from tilepipe.store import Label, Store
from tilepipe.tiling import Box


def settings_of(store: Store, label: Label, record: Mapping[str, Any]) -> tuple[Settings, JobSpec]:
    """Read the settings that the record holds; VerifyError where they are none of ours."""
    values, spec = record.get("settings"), record.get("spec")
    if not isinstance(values, dict) or not isinstance(spec, dict):
        raise VerifyError(
            f"{store.location}: label {label.name} does not say how it was made; "
            "only masks made by tilepipe run can be verified"
        )
    try:
        return Settings.from_json(values), JobSpec.checked(spec, source="recorded settings")
    except TilepipeError as error:
        raise VerifyError(f"{store.location}: label {label.name}: {error}") from error


def model_of(
    store: Store, label: Label, record: Mapping[str, Any], spec: JobSpec, weights: str | None
) -> Model:
    """Load the network that the record names; VerifyError if the weights are others."""
    named = spec.replace(weights=weights) if weights is not None else spec
    model = model_for(named, image_channels=store.channels)
    kept = record.get("model")
    sha256 = kept.get("sha256") if isinstance(kept, dict) else None
    if sha256 != model.sha256:
        raise VerifyError(
            f"{store.location}: label {label.name} was made with weights {str(sha256)[:16]}, but "
            f"{model.source} holds {model.sha256[:16]}; give the right ones with --weights"
        )
    if isinstance(kept, dict) and kept.get("identity", model.identity) != model.identity:
        raise VerifyError(
            f"{store.location}: label {label.name} was made with the weights of {model.source}, "
            "but with another normalisation, other classes or other arguments than stand there "
            "now; give the right ones with --weights"
        )
    return model


def reader_of(
    store: Store, label: Label, slide: Slide | None, slide_is: str, channels: int
) -> Read:
    """Return what reads the level that was segmented, as the network saw it."""
    if store.has_image:
        read = store.image(label.image_level).read
    else:
        shape = label.level(0).shape
        if slide is None:
            raise VerifyError(
                f"{store.location}: holds labels only and its slide is {slide_is}; say where it is "
                "with --slide"
            )
        number = next((n for n, info in enumerate(slide.levels) if info.shape == shape), None)
        if number is None:
            raise VerifyError(f"{slide.path}: has no level of {shape[0]} x {shape[1]} px")

        def read(box: Box, slide: Slide = slide, number: int = number) -> NDArray[Any]:
            return slide.read(box, level=number)

    return reads_shown(read, channels)
