"""``verify``: a finished mask held against the slide, its own pyramid and a second computation."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tilepipe.errors import SpecError, StoreError, VerifyError, argument
from tilepipe.infer.checks import check_levels, check_slide, slide_of
from tilepipe.infer.origin import model_of, reader_of, settings_of
from tilepipe.infer.recompute import SAMPLE_PX, Comparison, compare_place, computed_px, places
from tilepipe.infer.settings import Settings
from tilepipe.models import Model
from tilepipe.slide import Read
from tilepipe.steps import Tell, ignore
from tilepipe.store import Journal, Label, Store, open_store

REDUCED_FLIPS = 0.01
"""Share of sampled pixels that a mask made in bf16 or fp16 may differ from float32. Such a mask is
the exact one of its precision; nearly all that differs lies where two classes are nearly equal.
Other weights or wrong seams change several per cent."""
PROBABILITY_OFF = 1
"""How far, of 255, a stored probability may be from float32's: another cut rounds the other way."""
REDUCED_MEAN_OFF = 2.0
"""The same for bf16 and fp16, of the mean over a place: single pixels may be anywhere there."""
SAMPLES = 8
_LOOKS = 64
"""Places looked at for one that the network computed: most of a slide may be empty glass."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was checked about a label, and what came out."""

    label: str
    passed: bool
    date: str
    samples: int
    sampled_px: int
    flips: int
    """Sampled pixels of another class than the second computation's, ties apart."""
    flip_share: float
    flips_allowed: float
    ties: int
    max_probability_error: float
    precision: str
    image_units: int
    """Units of the image pyramid whose bytes were checked."""
    label_units: int
    slide: str
    """The slide that level 0 was compared with, or why it was not."""
    slide_units: int
    seconds: float
    probability_units: int = 0
    """Units of the probabilities whose bytes were checked; 0 where there are none."""
    object_units: int = 0
    """The same of the mask's objects."""
    probability_off: int = 0
    """Largest difference of a sampled probability from the second computation, of 255."""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as the label records them under ``verified``."""
        return {**asdict(self), "notes": list(self.notes)}


def verify(
    location: str,
    *,
    label: str | None = None,
    samples: int = SAMPLES,
    slide: str | None = None,
    weights: str | None = None,
    tell: Tell = ignore,
) -> Certificate:
    """Verify one label of a store (``label`` may be left out where there is only one).

    Checks every journal checksum against the bytes, every level against a fresh reduction of the
    one below, image level 0 against the slide where it is still there, and ``samples`` places of
    the mask against a second computation in float32 from larger pieces that are cut otherwise.
    Where there are probabilities, theirs as well: each within 1/255, or for a mask made in bf16 or
    fp16 within 2/255 on average of a place, as single pixels may be anywhere. The certificate is
    stored beside the label; where that cannot be, a note says so.

    ``slide`` and ``weights`` say where they are now, if they moved. ``tell`` hears how far it is.

    Raises SpecError for a number of samples that is none, VerifyError with the first wrong box, or
    where there is nothing finished to verify.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        # None would be computed again, and the mask held to be verified.
        raise SpecError(f"samples {samples!r}: how many places are computed again, from 0 on")
    started_s = time.perf_counter()
    store = open_store(location)
    name = label if label is not None else _only_label(store)
    found = store.label(name)
    record = found.read_record()
    if isinstance(mask := record.get("instances_of"), str):  # checked with their mask
        name, found = mask, store.label(mask)
        record = found.read_record()
    state, origin = record.get("state"), record.get("exported_from")
    if origin is not None:
        raise VerifyError(
            f"{location}: label {name} was exported from {origin} and has no checksums of its own; "
            f"verify that store: tilepipe verify {argument(origin)}"
        )
    if state != "done":
        raise VerifyError(
            f"{location}: label {name} is not finished (state: {state or 'not recorded'}); "
            "run the same job again, it does what is missing"
        )
    try:
        certificate = _verify(store, found, record, samples, slide, weights, tell, started_s)
    except VerifyError as error:
        failed = {"passed": False, "date": _now(), "reason": str(error)[:2000]}
        _keep(location, name, failed, of=record)
        raise
    if why := _keep(location, name, certificate.to_json(), of=record):
        note = f"the certificate could not be kept beside the mask: {why}"
        return replace(certificate, notes=(*certificate.notes, note))
    return certificate


def _verify(
    store: Store,
    label: Label,
    record: Mapping[str, Any],
    samples: int,
    slide_path: str | None,
    weights: str | None,
    tell: Tell,
    started_s: float,
) -> Certificate:
    settings, spec = settings_of(store, label, record)
    image_record = store.read_record()
    journal = store.journal(label.name, str(record.get("fingerprint")))
    label_units = check_levels(store, label, journal, stages=("segment", "label-reduce"), tell=tell)
    probability_units = 0
    if label.probabilities is not None:
        probability_units = check_levels(
            store, label.probabilities, journal, stages=("segment", "label-reduce"), tell=tell
        )
    object_units, notes = _check_objects(store, label, tell)
    image_units = slide_units = 0
    kept = image_record.get("fingerprint")
    if store.has_image and isinstance(kept, str):
        image_journal = store.journal(None, kept)
        image_units = check_levels(
            store, None, image_journal, stages=("ingest", "reduce"), tell=tell
        )
    slide, slide_is = slide_of(image_record, slide_path)
    try:
        if slide is not None and store.has_image:
            slide_units = check_slide(store, slide, tell=tell)
        model = model_of(store, label, record, spec, weights)
        read = reader_of(store, label, slide, slide_is, model.in_channels)
        found = _compare(label, settings, model, read, journal, samples, tell)
    finally:
        if slide is not None:
            slide.close()
    sampled_px = sum(one.compared_px for one in found)
    flips = sum(one.flips for one in found)
    allowed = REDUCED_FLIPS if _is_reduced(settings) else 0.0
    share = flips / sampled_px if sampled_px else 0.0
    if share > allowed:
        worst = next(one for one in found if one.flips > allowed * one.compared_px)
        raise VerifyError(
            f"{store.location}: label {label.name}, {worst.box}: {worst.flips} of "
            f"{worst.compared_px} pixels differ from the network's own answer ({share:.3%} over "
            f"{len(found)} places; {allowed:.1%} is allowed in {settings.precision}): the mask is "
            f"of other weights or was changed{_way_out(settings)}"
        )
    _check_probabilities(store, label, found, settings)
    return Certificate(
        label=label.name,
        passed=True,
        date=_now(),
        samples=len(found),
        sampled_px=sampled_px,
        flips=flips,
        flip_share=share,
        flips_allowed=allowed,
        ties=sum(one.ties for one in found),
        max_probability_error=max((one.max_probability_error for one in found), default=0.0),
        precision=settings.precision,
        image_units=image_units,
        label_units=label_units,
        slide=slide_is,
        slide_units=slide_units,
        seconds=round(time.perf_counter() - started_s, 3),
        probability_units=probability_units,
        probability_off=max((one.probability_off for one in found), default=0),
        object_units=object_units,
        notes=(*_notes(settings), *notes),
    )


def _check_objects(store: Store, mask: Label, tell: Tell) -> tuple[int, tuple[str, ...]]:
    """Check the bytes and the pyramid of a mask's objects; the units, and what is to be said."""
    for name in store.labels:
        objects = store.label(name)
        record = objects.read_record()
        if record.get("instances_of") != mask.name:
            continue
        if record.get("state") != "done":
            return 0, (f"its objects, {name}, are not finished and were not checked",)
        journal = store.journal(name, str(record.get("fingerprint")))
        stages = ("paint-objects", "object-reduce")
        return check_levels(store, objects, journal, stages=stages, tell=tell), ()
    return 0, ()


def _check_probabilities(
    store: Store, label: Label, found: Sequence[Comparison], settings: Settings
) -> None:
    reduced = _is_reduced(settings)
    for one in found:
        off = one.probability_mean_off if reduced else one.probability_off
        if off > (REDUCED_MEAN_OFF if reduced else PROBABILITY_OFF):
            raise VerifyError(
                f"{store.location}: probabilities of label {label.name}, {one.box}: "
                f"{'on average ' if reduced else 'up to '}{off:.3g}/255 from the network's own "
                f"answer: they are of other weights or were changed{_way_out(settings)}"
            )


def _is_reduced(settings: Settings) -> bool:
    return settings.precision in ("bf16", "fp16")


def _way_out(settings: Settings) -> str:
    """Say what else it may be, and what to do: a precision that was asked for had no guard."""
    if not _is_reduced(settings):
        return "; make it again with --overwrite"
    return (
        f", or {settings.precision} is too coarse for this network; make it again with --overwrite "
        "--precision fp32"
    )


def _compare(
    label: Label,
    settings: Settings,
    model: Model,
    read: Read,
    journal: Journal,
    samples: int,
    tell: Tell,
) -> list[Comparison]:
    level = label.level(0)
    planes = label.probabilities.level(0) if label.probabilities is not None else None
    facts = {key: record.facts for key, record in journal.recorded("segment", 0).items()}
    seed = int(hashlib.sha256(journal.fingerprint.encode()).hexdigest()[:8], 16)
    found: list[Comparison] = []
    for number, box in enumerate(places(settings.plan, _LOOKS * samples, seed)):
        if len(found) == samples:
            break
        stored = level.read(box)
        kept = planes.read(box) if planes is not None else None
        units = [facts.get((unit.iy, unit.ix), {}) for unit in settings.plan.grid.touching(box)]
        if any(unit.get("gated") for unit in units):
            # The whole slide's gate was closed: all background, whatever the network says.
            wrong = int(np.count_nonzero(stored))
            off = int(kept.max()) if kept is not None else 0
            found.append(Comparison(box, box.area, wrong, 0, 0.0, off, float(off)))
        else:
            try:
                computed = computed_px(settings.plan, box, facts, stored)
            except ValueError as error:
                raise VerifyError(
                    f"{label.name}: the journal does not say what was computed at {box}: {error}; "
                    "make the mask again with --overwrite"
                ) from error
            if not computed.any():
                continue  # skipped as empty glass: there is nothing to compare
            found.append(
                compare_place(
                    model,
                    settings,
                    box,
                    stored,
                    read,
                    extra_px=16 + 16 * (number % 4),
                    compared=computed,
                    probabilities=kept,
                )
            )
        tell("computed again", len(found) * SAMPLE_PX**2, samples * SAMPLE_PX**2)
    return found


def _only_label(store: Store) -> str:
    names = _made_by_tilepipe(store)
    if len(names) != 1:
        told = ", ".join(names) or "none"
        raise VerifyError(
            f"{store.location}: say which label to verify with --label; those made by tilepipe "
            f"are: {told}"
        )
    return names[0]


def verifiable(location: str) -> tuple[str, ...]:
    """Return the names of the labels that ``verify`` can take."""
    return _made_by_tilepipe(open_store(location))


def _made_by_tilepipe(store: Store) -> tuple[str, ...]:
    return tuple(n for n in store.labels if "settings" in store.label(n).read_record())


def _keep(
    location: str, name: str, certificate: dict[str, Any], *, of: Mapping[str, Any]
) -> str | None:
    """Store the certificate beside the label, or return why not: verify only needs to read.

    Raises VerifyError where the label is no more the one whose record is ``of``: what was found of
    that holds for no other.
    """
    try:
        store = open_store(location, writable=True)
        now = store.label(name).read_record() if name in store.labels else {}
        if any(now.get(key) != of.get(key) for key in ("fingerprint", "started")):
            raise VerifyError(
                f"{location}: label {name} was begun anew by another job, or taken away, while it "
                "was verified; verify it again when that is done"
            )
        store.label(name).write_record({**now, "verified": certificate})
    except (StoreError, OSError) as error:
        return str(error)
    return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _notes(settings: Settings) -> tuple[str, ...]:
    if settings.plan.mode == "blended":
        return ("blended: the places were computed on the same tile grid from other boxes",)
    if settings.cgm == "tile":
        return ("gated in each tile: the places were computed by the job's own tiles",)
    return ()
