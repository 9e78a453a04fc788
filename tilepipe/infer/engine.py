"""``Engine``: one unit in, its class ids out; read once, cut, batched, computed, stitched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ModelError
from tilepipe.infer.account import Account
from tilepipe.infer.backends import Backend, BatchResult, make_backend, means_out_of_memory
from tilepipe.infer.blend import Blend, blend_boxes
from tilepipe.infer.coverage import Coverage
from tilepipe.infer.cutting import (
    Skip,
    cut,
    groups,
    hull_of,
    read_finite,
    seen_by,
    sizes_of,
    trimmed,
    wanted_parts,
)
from tilepipe.infer.device import DeviceQueue, UnitJob
from tilepipe.infer.gate import gate_of
from tilepipe.infer.layout import Layout, smaller
from tilepipe.infer.maps import Maps, UnitResult
from tilepipe.infer.network import Output
from tilepipe.models import Model
from tilepipe.tiling import Box, Tile, TilePlan

Read = Callable[[Box], NDArray[Any]]
MakeBackend = Callable[..., Backend]


class _OverflowError(ArithmeticError):
    """Reduced precision did not hold the numbers of a unit."""


class _StaleLayoutError(RuntimeError):
    """Another lane made batch or tile smaller meanwhile."""


class Engine:
    """Runs one model on one device; made once per worker process.

    Thread-safe: several lanes may call ``segment`` at once; each reads its own unit while one
    thread alone, the device's, runs forwards in the order of arrival.
    """

    def __init__(
        self,
        model: Model,
        *,
        plan: TilePlan,
        device: str = "cpu",
        precision: str = "fp32",
        backend: str = "torch",
        batch: int = 1,
        account: Account | None = None,
        threads: int | None = None,
        cgm: str = "off",
        probabilities: bool = False,
        trims: bool = False,
        make: MakeBackend = make_backend,
    ) -> None:
        if cgm != "off" and not model.has_gate:
            raise ModelError(
                f"model {model.name}: --cgm {cgm} needs a classification gate and this network has "
                "none; build unet3plus with the option cgm, or leave --cgm off"
            )
        self.model = model
        self.account = account or Account()
        self.device, self.precision, self.backend = device, precision, backend
        self._threads = threads
        self._refused = ""
        self._cgm = cgm
        self._channels = len(model.classes) - 1 if probabilities else 0
        # The gate of a tile looks at all of it, and blended tiles stand on a grid.
        self._trims = trims and cgm == "off" and not _blends(plan)
        self._sizes = sizes_of(model, backend)
        self._make = make
        self._layout = Layout(plan, max(1, batch))
        self._lock = threading.Lock()
        self._backends: dict[tuple[Any, ...], Backend] = {}
        self._device = DeviceQueue()

    @property
    def plan(self) -> TilePlan:
        """The plan now in use; smaller tiles than asked for after memory ran out."""
        return self._layout.plan

    @property
    def batch(self) -> int:
        """The batch now in use."""
        return self._layout.batch

    def warm(self, dtype: np.dtype[Any]) -> Future[Backend]:
        """Have the device's thread build what runs pixels of ``dtype``, before the first unit."""
        return self._device.call(self._backend, self._layout, self.precision, dtype)

    def close(self) -> None:
        """End the device's thread and give back what the back-ends hold."""
        self._device.close()
        self._drop_backends()

    def segment(self, read: Read, box: Box, *, skip: Skip | None = None) -> UnitResult:
        """Return the class ids of ``box``, a box of the level, and probabilities if it makes them.

        ``read`` takes a box inside the level and returns pixels (c, y, x); it is called once with
        everything that the tiles need. Tiles of which ``skip`` says that they hold nothing, given
        what the network sees of them (the box may leave the level), become class 0 without being
        run, and so do empty parts of others where tiles may be trimmed; one in ``CHECK_SKIPPED`` is
        run all the same, to know what skipping costs.

        Raises ModelError where the pixels do not fit the network or even the smallest tile does
        not fit the device.
        """
        account = Account(parent=self.account)
        facts: dict[str, Any] = {"precision": self.precision}
        precision = self.precision
        while True:
            layout = self._layout
            try:
                maps = self._segment(layout, precision, read, box, account, facts, skip)
                break
            except _StaleLayoutError:
                continue
            except _OverflowError:
                facts.update(redone_fp32=True, precision="fp32")
                precision = "fp32"
            except Exception as error:
                if not means_out_of_memory(error):
                    raise
                told = self._shrink(layout, error)
                facts["oom"] = facts.get("oom", 0) + 1
                facts.setdefault("oom_events", []).append(told)
        facts["backend"] = self.backend
        if self._refused:
            facts["backend_refused"] = self._refused
        if account.device_s:
            facts["device_s"] = round(account.device_s, 6)
        facts["seconds"] = {step: round(value, 6) for step, value in account.seconds.items()}
        return UnitResult(maps.ids, facts, maps.probabilities)

    def gate(self, read: Read, box: Box) -> tuple[float, float]:
        """Return the largest gate logits of the tiles of ``box``, from the encoder alone.

        Those of "nothing" and of "something". For ``--cgm slide``: the slide's gate is open where
        of the maxima over all units the second is larger.
        """
        if not self.model.has_gate:
            raise ModelError(f"model {self.model.name} has no classification gate")
        plan = self._layout.plan
        tiles = self._trimmed(plan, list(plan.tiles(box)))
        hull, pixels = self._read(plan, tiles, read, box, self.account, {})
        job = self._device.call(
            gate_of, self.model, plan, tiles, hull, pixels, self.account, self.device
        )
        return job.result()

    def _segment(
        self,
        layout: Layout,
        precision: str,
        read: Read,
        box: Box,
        account: Account,
        facts: dict[str, Any],
        skip: Skip | None,
    ) -> Maps:
        whole = Maps.empty(box, channels=self._channels)
        coverage = Coverage(layout.plan, box)
        facts.pop("not_finite_px", None)  # of a try that failed

        def run(tiles: Sequence[Tile], part: Box, told: dict[str, Any]) -> Maps:
            tiles = self._trimmed(layout.plan, tiles)
            hull, pixels = self._read(layout.plan, tiles, read, part, account, told)
            make = partial(self._job, layout, precision, tiles, hull, pixels, part, account)
            return self._device.submit(make).result()

        for part in blend_boxes(layout.plan, box, self.model.n_outputs):
            tiles = [
                (tile, self._wanted(layout.plan, tile, skip)) for tile in layout.plan.tiles(part)
            ]
            wanted = [piece for tile, parts in tiles for piece in coverage.add(tile, parts)]
            if wanted:
                made = run(wanted, part, facts)
                if part == box:
                    whole = made
                else:
                    whole.put(made)
            for tile, parts in tiles:
                if coverage.wants_check(tile, parts):
                    coverage.check(tile, parts, run([tile], tile.core, {}).ids)
        facts.update(coverage.facts(looks_for_empty=skip is not None))
        return whole

    def _wanted(self, plan: TilePlan, tile: Tile, skip: Skip | None) -> list[Box]:
        """Return the parts of a tile's core that are to be computed: all, some or none."""
        if skip is None:
            return [tile.core]
        if self._trims:
            return wanted_parts(plan, tile.core, skip, self._sizes)
        return [] if skip(seen_by(plan, tile)) else [tile.core]

    def _trimmed(self, plan: TilePlan, tiles: Sequence[Tile]) -> Sequence[Tile]:
        """Take each tile as small as its core allows, where that changes no bit."""
        return trimmed(plan, tiles, self._sizes) if self._trims else tiles

    def _read(
        self,
        plan: TilePlan,
        tiles: Sequence[Tile],
        read: Read,
        box: Box,
        account: Account,
        facts: dict[str, Any],
    ) -> tuple[Box, NDArray[Any]]:
        """Return the hull of what the tiles read and its pixels (c, y, x), mirrored outside.

        Of ``box``, which they are read for, ``facts`` is told what was not finite: in the halo it
        is another's, or a mirror.
        """
        hull = hull_of(tiles)
        with account.span("read"):
            pixels, wrong = read_finite(read, hull, plan.extent)
        channels = self.model.in_channels
        if pixels.ndim != 3 or pixels.shape[0] != channels:
            got = pixels.shape[0] if pixels.ndim == 3 else f"{pixels.ndim} axes, not"
            raise ModelError(
                f"model {self.model.name} takes {channels} channels and the image has {got}; "
                "use weights made for this kind of image"
            )
        if wrong is not None:
            own = wrong[hull.intersect(box).shift(-hull.y0, -hull.x0).slices]
            if own.any():
                facts["not_finite_px"] = facts.get("not_finite_px", 0) + int(own.sum())
        return hull, pixels

    def _job(
        self,
        layout: Layout,
        precision: str,
        tiles: Sequence[Tile],
        hull: Box,
        pixels: NDArray[Any],
        box: Box,
        account: Account,
    ) -> UnitJob:
        """Return how the tiles of a unit are run; called in the device's thread."""
        if layout is not self._layout:
            raise _StaleLayoutError
        plan = layout.plan
        backend = self._backend(layout, precision, pixels.dtype)
        blend = Blend(plan, box, self.model, backend.result_device) if _blends(plan) else None
        maps = Maps.empty(box, channels=self._channels) if blend is None else None
        finite = True

        def put(group: Sequence[Tile], result: BatchResult) -> None:
            nonlocal finite
            finite = finite and result.finite
            if blend is not None:
                with account.span("compute"):
                    blend.add(group, result.values)
            elif maps is not None:
                with account.span("device-to-host"):
                    maps.put_tiles(group, result)

        def whole() -> Maps:
            if not finite and precision in ("bf16", "fp16"):
                raise _OverflowError
            if maps is not None:
                return maps
            assert blend is not None
            with account.span("compute"):
                return Maps(box, blend.ids(), blend.quantised() if self._channels else None)

        batches = (
            (group, [cut(pixels, hull, tile.padded) for tile in group])
            for group in groups(tiles, layout.batch)
        )
        return UnitJob(backend, batches, put, whole, self._drop_backends, account)

    def _backend(self, layout: Layout, precision: str, dtype: np.dtype[Any]) -> Backend:
        plan = layout.plan
        key = (plan.input_px, layout.batch, precision, dtype.str)
        if key not in self._backends:
            # What reduced precision could not hold is redone by the plainest of back-ends.
            name = self.backend if precision == self.precision else "torch"
            options = {
                "batch": layout.batch,
                "dtype": dtype,
                "device": self.device,
                "precision": precision,
                "threads": self._threads,
                "output": self._output(plan),
                "gated": self._cgm == "tile",
            }
            try:
                self._backends[key] = self._make(name, self.model, plan, **options)
            except ModelError as error:
                if name != "openvino":
                    raise
                # It cannot take this network, or is missing here: the same pixels either way.
                self.backend, self._refused = "torch", str(error)
                self._backends[key] = self._make("torch", self.model, plan, **options)
        return self._backends[key]

    def _output(self, plan: TilePlan) -> Output:
        if _blends(plan):
            return "probabilities"
        return "ids+probabilities" if self._channels else "ids"

    def _drop_backends(self) -> None:
        for backend in self._backends.values():
            backend.close()
        self._backends.clear()

    def _shrink(self, layout: Layout, error: Exception) -> str:
        """Halve the batch, then the tile; returns what was done, ModelError where nothing can."""
        with self._lock:
            if layout is not self._layout:
                return "retried with the smaller batch or tile of another lane"
            gated = self._cgm == "tile"
            self._layout, told = smaller(
                layout, self.model, device=self.device, error=error, gated=gated
            )
        # What ran the larger batch or tile, in another precision too, would hold its memory on.
        self._device.call(self._drop_backends).result()
        return told


def _blends(plan: TilePlan) -> bool:
    return plan.mode == "blended"
