"""What is fuzzed: a target makes one damaged input from a seed, uses it, and judges the outcome.

``run`` returns ``ok`` or ``refused`` and may raise a TilepipeError, which is a refusal too. It
raises ``Finding`` for what must not be; the worker takes any other exception for one. Whatever a
target makes is deterministic.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path

import numpy as np

from tests.fuzz.mutate import damage_bytes, damage_document, damage_json, damage_text, damage_tiff
from tilepipe.errors import TilepipeError
from tilepipe.tiling import Box

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TILEPIPE_DATA", ROOT.parent / "shared" / "data"))
SMALL_BYTES = 60_000
MOST_PX = 1 << 20


class Finding(Exception):
    """Something that must not happen: wrong pixels without a word, above all."""


def boxes_of(shape, rng):
    """The whole of a small image, a few boxes of a large one."""
    height, width = shape
    if height * width <= MOST_PX:
        return [Box.of_shape(shape)]
    found = []
    for _ in range(3):
        y, x = rng.randrange(height), rng.randrange(width)
        found.append(Box(y, x, min(height, y + 200), min(width, x + 200)))
    return found


class Tiff:
    """TIFF bytes: the small files of the corpora, and some made here."""

    def __init__(self, folder):
        self.path = folder / "slide.tif"
        self.files = [*self._made(folder / "made"), *self._corpus()]
        self._known = {}
        self._facts(self.files[0])

    @staticmethod
    def _corpus():
        return sorted(
            path
            for name in ("tiff_variants", "malformed")
            for path in (DATA / name).rglob("*.tif*")
            if path.stat().st_size < SMALL_BYTES
        )

    @staticmethod
    def _made(folder):
        import tifffile

        folder.mkdir()
        generator = np.random.default_rng(0)
        rgb = (generator.random((70, 90, 3)) * 40 + np.linspace(0, 200, 90)[None, :, None]).astype(
            "u1"
        )
        grey = generator.integers(0, 60000, (61, 47)).astype("u2")
        common = {"photometric": "rgb", "tile": (32, 32)}
        layouts = {
            "tiles.tif": (rgb, common),
            "jpeg.tif": (rgb, {**common, "compression": "jpeg"}),
            "deflate.tif": (rgb, {**common, "compression": "adobe_deflate", "predictor": 2}),
            "lzw.tif": (rgb, {"photometric": "rgb", "compression": "lzw", "rowsperstrip": 9}),
            "strips.tif": (grey, {"rowsperstrip": 8}),
            "big.tif": (grey, {"tile": (16, 16), "bigtiff": True, "byteorder": ">"}),
            "planar.tif": (np.moveaxis(rgb, -1, 0), {**common, "planarconfig": "separate"}),
            "float.tif": (generator.random((40, 33), dtype="f4"), {"tile": (16, 16)}),
            "ome.ome.tif": (np.stack([grey, grey + 1]), {"metadata": {"axes": "CYX"}}),
        }
        paths = []
        for name, (pixels, options) in layouts.items():
            paths.append(folder / name)
            tifffile.imwrite(paths[-1], pixels, **options)
        with tifffile.TiffWriter(folder / "pyramid.tif") as writer:
            writer.write(rgb, subifds=1, resolution=(20000, 20000), resolutionunit=3, **common)
            writer.write(rgb[::2, ::2], subfiletype=1, **common)
        return [*paths, folder / "pyramid.tif"]

    def run(self, rng):
        source = rng.choice(self.files[:10] if rng.random() < 0.3 else self.files)
        raw = source.read_bytes()
        payload, comparable = self._facts(source)
        how = rng.random()
        only_payload = how < 0.3 and bool(payload)
        if only_payload:
            data = damage_bytes(raw, rng, within=payload, most=6)
        elif how < 0.75:
            data = damage_tiff(raw, rng)
        else:
            data = damage_bytes(raw, rng)
        self.path.write_bytes(data)
        return self._read(
            rng,
            compare=only_payload and comparable,
            on_damage="fill" if rng.random() < 0.25 else "error",
        )

    def _facts(self, source):
        """Where the pixel bytes lie, and whether both readers agree on the intact file."""
        if source not in self._known:
            spans, equal = [], False
            try:
                import tifffile

                with tifffile.TiffFile(source) as tiff:
                    page = tiff.pages[0]
                    size = source.stat().st_size
                    spans = [
                        (offset, min(count, size - offset))
                        for offset, count in zip(
                            page.dataoffsets, page.databytecounts, strict=False
                        )
                        if 0 < offset < size and count > 0
                    ]
                from tilepipe.slide import open_slide

                with open_slide(source) as slide:
                    ours = slide.read(Box.of_shape(slide.levels[0].shape))
                theirs = self._tifffile(source, ours.shape)
                equal = theirs is not None and np.array_equal(ours, theirs, equal_nan=True)
            except Exception:  # malformed as it is: only crashes are looked for
                equal = False
            self._known[source] = spans, equal
        return self._known[source]

    @staticmethod
    def _tifffile(path, shape):
        """The pixels of the first page (c, y, x) as tifffile reads them, None where it does not."""
        import tifffile

        try:
            with tifffile.TiffFile(path) as tiff:
                page = tiff.pages[0]
                pixels, axes = page.asarray(), page.axes
        except Exception:
            return None
        if axes.endswith("S"):
            pixels = np.moveaxis(pixels, -1, 0)
        pixels = pixels.reshape((-1, *pixels.shape[-2:]))[: shape[0]]
        return pixels if pixels.shape == shape else None

    def _read(self, rng, *, compare, on_damage):
        from tilepipe.slide import open_slide, tissue_mask

        with open_slide(self.path, on_damage=on_damage) as slide:
            slide.fingerprint()
            if rng.random() < 0.2 and len(slide.levels) and max(slide.levels[0].shape) < 4096:
                tissue_mask(slide)
            whole = None
            for number, level in enumerate(slide.levels[:4]):
                for box in boxes_of(level.shape, rng):
                    pixels = slide.read(box, level=number)
                    if pixels.shape != (slide.channels, *box.shape) or pixels.dtype != slide.dtype:
                        raise Finding(f"level {number} {box}: {pixels.shape} {pixels.dtype}")
                    if number == 0 and box == Box.of_shape(level.shape):
                        whole = pixels
            if whole is not None and whole[0].size <= 1 << 16:
                side = rng.choice((17, 64, 100))
                for box in Box.of_shape(whole.shape[1:]).split((side, side)):
                    part = slide.read(box)
                    if not np.array_equal(part, whole[(slice(None), *box.slices)], equal_nan=True):
                        raise Finding(f"{box} read alone differs from the whole image")
            compare = compare and not slide.damage
        if compare and whole is not None:
            theirs = self._tifffile(self.path, whole.shape)
            if theirs is not None and not np.array_equal(whole, theirs, equal_nan=True):
                raise Finding("pixels differ from those of tifffile without a word")
        return "ok"


class StoreBytes:
    """Files of a small store: metadata, chunks, records of the journal."""

    version = "0.5"

    def __init__(self, folder):
        from tilepipe.spec import default_classes
        from tilepipe.store import create_store, reduce_image, reduce_label

        self.root = folder / f"s{self.version}.zarr"
        generator = np.random.default_rng(1)
        store = create_store(
            str(self.root), channels=2, dtype="uint16", extent=(24, 520), mpp=(0.5, 0.5),
            channel_names=["a", "b"], channel_colors=[None, None], ome_zarr=self.version,
            unit_px=320, chunk_px=64,
        )  # fmt: skip
        label = store.create_label("m", classes=default_classes(3), unit_px=320)
        pixels = generator.integers(0, 900, (2, 24, 520)).astype("u2")
        mask = np.repeat(np.repeat(generator.integers(0, 3, (6, 130)), 4, 0), 4, 1).astype("u1")
        mask[:, :330] = 0  # shards that are not stored at all
        self.pixels = {}
        journals = store.journal(None, "f" * 32), store.journal("m", "e" * 32)
        for level in range(store.n_levels):
            for kind, (array, values) in enumerate(
                ((store.image(level), pixels), (label.level(level), mask))
            ):
                self.pixels[kind, level] = values
                stage = (("ingest", "reduce"), ("segment", "label-reduce"))[kind][min(level, 1)]
                for unit in array.grid:
                    checksum = array.write_unit(unit, values[(..., *unit.box.slices)])
                    journals[kind].write(stage, level, unit, checksum=checksum)
            pixels, mask = reduce_image(pixels), reduce_label(mask)
        label.write_record({"fingerprint": "e" * 32, "state": "done"})
        store.write_record({"fingerprint": "f" * 32, "state": "done", "unit_px": 320})
        self.files = sorted(path for path in self.root.rglob("*") if path.is_file())
        self.documents = [p for p in self.files if p.suffix == ".json" or p.name.startswith(".z")]
        self.documents = [p for p in self.documents if "journal" not in p.parts]
        self.chunks = [p for p in self.files if p not in self.documents and p.suffix != ".json"]
        self._read([self.root / "zarr.json"], random.Random(0))

    def run(self, rng):
        if rng.random() < 0.55:
            path = rng.choice(self.documents)
            return self._with({path: damage_document(path.read_bytes(), rng)}, rng)
        path = rng.choice(self.chunks)
        raw = path.read_bytes()
        what = rng.random()
        if what < 0.1:
            other = rng.choice(self.chunks)
            return self._with({path: other.read_bytes(), other: raw}, rng)
        data = b"" if what < 0.15 else None if what < 0.2 else damage_bytes(raw, rng)
        return self._with({path: data}, rng)

    def _with(self, changed, rng):
        """Read the store with some files changed (None: removed), then put them back."""
        before = {path: path.read_bytes() for path in changed}
        try:
            for path, data in changed.items():
                path.unlink() if data is None else path.write_bytes(data)
            if rng.random() < 0.2:
                return self._read_as_slide(changed, rng)
            return self._read(changed, rng)
        finally:
            for path, data in before.items():
                path.write_bytes(data)

    def _read_as_slide(self, changed, rng):
        from tilepipe.slide import open_slide

        # A chunk that is away, or another's, is not noticed by its own bytes; and no checksum of
        # Zarr v2 is known to the programs that 0.4 is for: `tilepipe verify` is what notices.
        checked = (
            self.version == "0.5"
            and len(changed) == 1
            and changed.keys() <= set(self.chunks)
            and all(changed.values())
        )
        with open_slide(self.root) as slide:
            for number, level in enumerate(slide.levels[:3]):
                for box in boxes_of(level.shape, rng):
                    pixels = slide.read(box, level=number)
                    wanted = self.pixels.get((0, number))
                    if checked and not np.array_equal(pixels, wanted[(..., *box.slices)]):
                        raise Finding(f"as a slide, level {number} {box}: other pixels")
        return "ok"

    def _read(self, changed, rng):
        from tilepipe.pipeline.inspect import store_facts
        from tilepipe.store import open_store

        store = open_store(str(self.root))
        refused = False
        if rng.random() < 0.3:
            try:
                json.dumps(store_facts(store))
            except TilepipeError:
                refused = True
        # A damaged file of the label shows in the label; the root's shows in both.
        inside = {path.relative_to(self.root).parts[0] for path in changed}
        for kind in (0, 1) if inside & {"zarr.json", ".zattrs"} else (int("labels" in inside),):
            try:
                source = store.image if kind == 0 else store.label("m").level
                count = store.n_levels if kind == 0 else store.label("m").n_levels
                self._levels(store, kind, source, count, rng)
            except TilepipeError:
                refused = True
        return "refused" if refused else "ok"

    def _levels(self, store, kind, source, count, rng):
        journal = store.journal(*((None, "f" * 32), ("m", "e" * 32))[kind])
        for index in range(min(count, 4)):
            level = source(index)
            wanted = self.pixels.get((kind, index))
            if wanted is None or level.shape != wanted.shape[-2:]:
                for box in boxes_of(level.shape, rng):
                    level.read(box)
                continue
            stage = (("ingest", "reduce"), ("segment", "label-reduce"))[kind][min(index, 1)]
            recorded = journal.recorded(stage, index)
            for unit in level.grid:
                pixels = level.read(unit.box)
                if np.array_equal(pixels, wanted[(..., *unit.box.slices)]):
                    continue
                record = recorded.get((unit.iy, unit.ix))
                if record is not None and record.checksum == level.checksum(unit):
                    raise Finding(
                        f"{('image', 'label')[kind]} level {index} {unit.box}: other pixels, and "
                        f"the checksum agrees ({pixels.dtype} {pixels.shape})"
                    )


class StoreBytes04(StoreBytes):
    """The same in OME-Zarr 0.4."""

    version = "0.4"


class JournalRecords:
    """Records of a journal: each is believed only where it is about its own unit and job."""

    def __init__(self, folder):
        from tilepipe.store import create_store

        root = folder / "j.zarr"
        self.store = create_store(
            str(root), channels=1, dtype="uint8", extent=(30, 40), mpp=None, channel_names=["a"],
            channel_colors=[None], unit_px=16, chunk_px=16,
        )  # fmt: skip
        journal = self.store.journal(None, "a" * 32)
        for unit in self.store.image(0).grid:
            journal.write("ingest", 0, unit, checksum="0" * 16, facts={"px": unit.box.area})
        self.folder = root / "tilepipe" / "journal" / "_image" / "ingest" / "0"
        self.files = sorted(self.folder.iterdir())
        self.units = len(self.files)

    def run(self, rng):
        path = rng.choice(self.files)
        raw = path.read_bytes()
        place = path
        what = rng.random()
        if what < 0.15:
            data = raw
            names = ["0.0", "1.2", "9.9", "x", "0", "-1.0", "00.0", "0.0.json.partial"]
            name = rng.choice(names)
            place = path.with_name(name if name.endswith("l") else f"{name}.json")
        elif what < 0.2:
            data = json.dumps({**json.loads(raw), "facts": {"a": "b" * 20_000}}).encode()
        else:
            data = damage_document(raw, rng)
        replaced = place.read_bytes() if place.exists() else None
        try:
            place.write_bytes(data)
            journal = self.store.journal(None, "a" * 32)
            found = journal.recorded("ingest", 0)
        finally:
            if replaced is None:
                place.unlink()
            else:
                place.write_bytes(replaced)
        for (iy, ix), record in found.items():
            if (record.iy, record.ix, record.stage, record.level) != (iy, ix, "ingest", 0):
                raise Finding(f"a record of another unit was believed: {record}")
            if record.fingerprint != "a" * 32:
                raise Finding(f"a record of another job was believed: {record}")
            json.dumps(dict(record.facts))
        if len(found) > self.units:
            raise Finding(f"{len(found)} of {self.units} units are recorded")
        return "refused" if journal.rejected else "ok"


class JobFiles:
    """Job TOML, training TOML and manifests."""

    def __init__(self, folder):
        import tilepipe.cli.run
        import tilepipe.pipeline.run
        import tilepipe.train.spec  # noqa: F401 - what takes long is done before the clock runs

        self.path = folder / "job.toml"
        self.job = (
            'model = "unet"\nweights = "random:0"\nclasses = 3\nbase = 8\nname = "m"\nlevel = 0\n'
            'mpp = 0.5\ndevice = "auto"\nprecision = "fp32"\nbackend = "torch"\ntune = false\n'
            'tile = 572\nbatch = 2\nhalo = 96\nunit = 512\nworkers = 2\nscheduler = "local"\n'
            'part = "0/3"\nretries = 3\nome-zarr = "0.5"\non_damage = "fill"\ntissue = "off"\n'
            "max_pixels = 1000000\nin_place = false\ninstances = true\n[options]\ndepth = 4\n"
        )
        self.train = (
            'images = "img"\nlabels = "lab"\nmodel = "unet"\nout = "w.safetensors"\nepochs = 3\n'
            'target = "foreground+border"\nbatch = 4\ncrop = 256\nlr = 0.001\nseed = 0\n'
        )
        self.manifest = "slide,output,mpp,label\na.tif,a.zarr,0.5,unet\nb/c.svs,,,\n"

    def run(self, rng):
        what = rng.randrange(4)
        if what == 2:
            return self._train(rng)
        if what == 3:
            return self._manifest(rng)
        from tilepipe.spec import JobSpec

        self.path.write_bytes(self._damaged(self.job, rng))
        spec = JobSpec.from_toml(self.path)
        if JobSpec.checked(json.loads(json.dumps(spec.to_json()))) != spec:
            raise Finding(f"settings change on their way through JSON: {spec}")
        return "ok"

    @staticmethod
    def _damaged(text, rng):
        if rng.random() < 0.02:
            return b"a = " + b"[" * 100_000
        damaged = damage_text(text, rng).encode("utf-8", "surrogateescape")
        return damage_bytes(damaged, rng) if rng.random() < 0.2 else damaged

    def _train(self, rng):
        from tilepipe.train.spec import TrainSpec

        self.path.write_bytes(self._damaged(self.train, rng))
        TrainSpec.from_toml(self.path)
        return "ok"

    def _manifest(self, rng):
        from tilepipe.cli.requests import _from_manifest
        from tilepipe.spec import JobSpec

        self.path.write_bytes(self._damaged(self.manifest, rng))
        folder = self.path.parent / "out"
        for request in _from_manifest(self.path, str(folder), JobSpec()):
            if not Path(request.output).resolve().is_relative_to(folder.resolve()):
                raise Finding(f"output {request.output!r} leaves {folder}")
        return "ok"


class Checkpoints:
    """Safetensors files: their own header, ours in it, and the tensors."""

    def __init__(self, folder):
        import torch

        from tilepipe.models import build
        from tilepipe.models.checkpoint import read_checkpoint, save_checkpoint
        from tilepipe.models.normalisation import Normalisation
        from tilepipe.spec import default_classes

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.path = folder / "w.safetensors"
        net = build("unet", in_channels=3, classes=2, base=1)
        save_checkpoint(
            self.path, net, name="unet", arguments={"base": 1}, classes=default_classes(2),
            normalisation=Normalisation("mean-std", (0.5,) * 3, (0.2,) * 3), mpp=0.5,
        )  # fmt: skip
        self.raw = self.path.read_bytes()
        read_checkpoint(self.path)

    def run(self, rng):
        from tilepipe.models import load_model, read_header
        from tilepipe.models.checkpoint import read_checkpoint

        self.path.write_bytes(self._damaged(rng))
        read_header(self.path)
        _, net = read_checkpoint(self.path)
        if rng.random() < 0.05:
            load_model(str(self.path))
        if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values()):
            raise Finding("weights that are not finite were taken")
        return "ok"

    def _damaged(self, rng):
        what = rng.random()
        length = int.from_bytes(self.raw[:8], "little")
        if what < 0.2:
            return damage_bytes(self.raw, rng)
        if what < 0.3:
            return damage_bytes(self.raw, rng, within=[(0, 8 + length)])
        head = json.loads(self.raw[8 : 8 + length])
        if what < 0.5:
            head = damage_json(head, rng)
        else:
            own = damage_json(json.loads(head["__metadata__"]["tilepipe"]), rng)
            head["__metadata__"]["tilepipe"] = json.dumps(own)
        text = json.dumps(head).encode()
        return len(text).to_bytes(8, "little") + text + self.raw[8 + length :]


class Planted:
    """Misbehaviour on purpose, so that a test can see that the harness notices it."""

    def __init__(self, folder):
        del folder
        self.seed = 0
        self.held = []

    def run(self, rng):
        what = rng.choice(("fine", "refused", "crash", "hang", "memory", "pixels", "abort"))
        if what == "refused":
            raise TilepipeError("no")
        if what == "crash":
            raise KeyError("planted")
        if what == "hang":
            while True:
                hashlib.sha256(bytes(1000)).digest()
        if what == "memory":
            block = np.ones(150 << 20, np.uint8)
            return str(block[-1])
        if what == "pixels":
            raise Finding("planted pixels")
        if what == "abort":
            time.sleep(0.01)
            os.abort()
        return "ok"


TARGETS = {
    "tiff": Tiff,
    "store": StoreBytes,
    "store04": StoreBytes04,
    "journal": JournalRecords,
    "job": JobFiles,
    "checkpoint": Checkpoints,
    "planted": Planted,
}


def generator_of(target, seed):
    """The randomness of one execution."""
    return random.Random(f"{target}:{seed}")
