"""OME-TIFF pyramids of several channels, and data sets spread over several files."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tifffile

import tilepipe
from tilepipe.errors import SlideError, TilepipeError
from tilepipe.slide import open_slide
from tilepipe.tiling import Box

IMAGE = np.random.default_rng(0).integers(0, 60_000, (3, 200, 300), dtype=np.uint16)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_pyramid_of_channels(tmp_path, compression):
    options = {"tile": (64, 64), "photometric": "minisblack", "compression": compression}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", bigtiff=True) as writer:
        meta = {"axes": "CYX", "PhysicalSizeX": 0.3, "PhysicalSizeY": 0.4}
        writer.write(IMAGE, subifds=2, metadata=meta, **options)
        writer.write(IMAGE[:, ::2, ::2], subfiletype=1, **options)
        writer.write(IMAGE[:, ::4, ::4], subfiletype=1, **options)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.channels == 3
        assert slide.mpp == (0.4, 0.3)
        assert [level.shape for level in slide.levels] == [(200, 300), (100, 150), (50, 75)]
        for number, step in enumerate((1, 2, 4)):
            y, x = slide.levels[number].shape
            box = Box(3, 5, y, x - 1)
            wanted = IMAGE[:, ::step, ::step][(slice(None), *box.slices)]
            np.testing.assert_array_equal(slide.read(box, level=number), wanted)


XML = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{uuid}">
<Image ID="Image:0" Name="a"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16"
SizeX="300" SizeY="200" SizeC="2" SizeZ="1" SizeT="1" BigEndian="false">
<Channel ID="Channel:0:0" Name="one" Color="16711935" SamplesPerPixel="1"/>
<Channel ID="Channel:0:1" Name="two" SamplesPerPixel="1"/>
<TiffData FirstC="0" FirstZ="0" FirstT="0" IFD="0" PlaneCount="1">
<UUID FileName="a.ome.tif">urn:uuid:00000000-0000-0000-0000-00000000000a</UUID></TiffData>
<TiffData FirstC="1" FirstZ="0" FirstT="0" IFD="0" PlaneCount="1">
<UUID FileName="b.ome.tif">urn:uuid:00000000-0000-0000-0000-00000000000b</UUID></TiffData>
</Pixels></Image></OME>"""


def spread(folder):
    for name, plane in (("a", IMAGE[0]), ("b", IMAGE[1])):
        text = XML.format(uuid=f"00000000-0000-0000-0000-00000000000{name}")
        tifffile.imwrite(
            folder / f"{name}.ome.tif",
            plane,
            description=text.encode(),
            metadata=None,
            tile=(64, 64),
            compression="zlib",
        )
    return folder / "a.ome.tif"


def change(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_channels_in_two_files(tmp_path):
    path = spread(tmp_path)
    with open_slide(path) as slide:
        assert slide.channel_names == ("one", "two")
        assert slide.channel_colors == ("00FF00", None)
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 300)), IMAGE[:2])
        first = slide.fingerprint()
    change(tmp_path / "b.ome.tif")
    with open_slide(path) as slide:
        changed = slide.fingerprint()
    assert changed["sha256"] == first["sha256"]
    assert changed["parts"] != first["parts"]


def test_another_file_of_the_set_that_is_replaced_before_a_worker_opens_it(tmp_path, monkeypatch):
    import tilepipe.pipeline.context as room

    path = spread(tmp_path)
    opened = room.open_slide

    def replaced(*args, **settings):
        change(tmp_path / "b.ome.tif")
        return opened(*args, **settings)

    monkeypatch.setattr(room, "open_slide", replaced)
    with pytest.raises(TilepipeError, match="is another file than the one that this job was"):
        tilepipe.ingest(path, tmp_path / "a.zarr")


def test_a_set_that_was_copied_is_the_slide_of_its_store(tmp_path):
    from tilepipe.infer.checks import slide_of

    store = tilepipe.ingest(spread(tmp_path), tmp_path / "a.zarr")
    os.utime(tmp_path / "b.ome.tif", (1, 1))
    slide, said = slide_of(store.read_record(), None)
    assert slide is not None, said
    slide.close()
    change(tmp_path / "b.ome.tif")
    slide, said = slide_of(store.read_record(), None)
    assert slide is None
    assert said.startswith("replaced by another file")


def test_a_file_of_the_set_is_missing(tmp_path):
    path = spread(tmp_path)
    (tmp_path / "b.ome.tif").unlink()
    with pytest.raises(SlideError, match="plane 1 lies in another file that is missing"):
        open_slide(path)


IMAGES = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{uuid}">
{images}</OME>"""
ONE_IMAGE = """<Image ID="Image:{k}" Name="a"><Pixels ID="Pixels:{k}" DimensionOrder="XYCZT"
Type="uint16" SizeX="300" SizeY="200" SizeC="1" SizeZ="1" SizeT="1" PhysicalSizeX="0.{k}">
<Channel ID="Channel:{k}:0" Name="stain {k}" SamplesPerPixel="1"/>
<TiffData FirstC="0" FirstZ="0" FirstT="0" IFD="0" PlaneCount="1">
<UUID FileName="{k}.ome.tif">urn:uuid:{k}</UUID></TiffData></Pixels></Image>"""


def images_of_a_set(folder):
    """Three files, an image in each, every one telling of all."""
    for k in (1, 2, 3):
        text = IMAGES.format(uuid=k, images="".join(ONE_IMAGE.format(k=n) for n in (1, 2, 3)))
        tifffile.imwrite(
            folder / f"{k}.ome.tif", IMAGE[k - 1], description=text.encode(), metadata=None
        )


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_image_of_the_file_that_was_given(tmp_path, number, alone, renamed):
    images_of_a_set(tmp_path)
    path = tmp_path / f"{number}.ome.tif"
    if alone:
        for other in {1, 2, 3} - {number}:
            (tmp_path / f"{other}.ome.tif").unlink()
    if renamed:
        path = path.rename(tmp_path / "renamed.ome.tif")
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 300))[0], IMAGE[number - 1])
        assert slide.mpp == (number / 10, number / 10)
        assert slide.channel_names == (f"stain {number}",)


MIXED = [
    [{"compression": "lzw"}, {"compression": "lzw", "predictor": 2}],
    [{"rowsperstrip": 32}, {"rowsperstrip": 33}],
    [{"rowsperstrip": 32, "compression": "zlib"}, {"rowsperstrip": 33, "compression": "zlib"}],
    [{}, {"compression": "zstd"}],
]


@pytest.mark.parametrize("options", MIXED, ids=str)
def test_each_channel_is_read_as_it_is_stored(tmp_path, options):
    y, x = np.mgrid[:200, :300]
    image = np.stack([x * 7 + y, x + y * 5]).astype(np.uint16)
    text = XML.format(uuid="a").replace('FileName="b.ome.tif"', 'FileName="a.ome.tif"')
    text = text.replace('IFD="0"', 'IFD="1"').replace('IFD="1"', 'IFD="0"', 1)
    for digit in "ab":
        text = text.replace(f"urn:uuid:00000000-0000-0000-0000-00000000000{digit}", "urn:uuid:a")
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        for plane, option in zip(image, options, strict=True):
            writer.write(plane, description=text.encode(), metadata=None, **option)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 300)), image)


def test_channels_of_different_dtypes_are_refused(tmp_path):
    path = spread(tmp_path)
    text = XML.format(uuid="00000000-0000-0000-0000-00000000000b")
    tifffile.imwrite(
        tmp_path / "b.ome.tif",
        IMAGE[1].astype(np.float32),
        description=text.encode(),
        metadata=None,
        tile=(64, 64),
        compression="zlib",
    )
    with pytest.raises(SlideError, match="channels of different sizes or dtypes"):
        open_slide(path)


@pytest.mark.parametrize(
    "sizes", ['SizeC="3" SizeZ="1"', 'SizeC="1" SizeZ="3"', 'SizeC="4" SizeZ="1"']
)
def test_channels_are_the_pages_in_turn_where_the_xml_leaves_out_which(tmp_path, sizes):
    """As OME-TIFFs are written with libvips; tifffile sees three images, of which one was read."""
    text = f"""<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="300" SizeY="200" SizeT="1"
{sizes}></Pixels></Image></OME>"""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=False) as writer:
        for plane in IMAGE:
            options = {"tile": (64, 64), "photometric": "minisblack", "metadata": None}
            writer.write(plane, subifds=1, description=text.encode(), **options)
            writer.write(plane[::2, ::2], subfiletype=1, **options)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        told = any("pages of equal size" in note for note in slide.notes)
        if "3" in sizes.split()[0]:
            assert not told
            wanted = IMAGE
        else:
            assert told
            wanted = IMAGE[:1]
        assert slide.channels == len(wanted)
        assert [level.shape for level in slide.levels] == [(200, 300), (100, 150)]
        for number, step in enumerate((1, 2)):
            box = Box(3, 5, 200 // step, 300 // step)
            expected = wanted[:, ::step, ::step][(slice(None), *box.slices)]
            np.testing.assert_array_equal(slide.read(box, level=number), expected)


@pytest.mark.parametrize("how", ["cut off", "changed"])
def test_a_damaged_xml_is_told(tmp_path, how):
    """Three channels look like three images then, of which one is used."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, IMAGE, metadata={"axes": "CYX", "PhysicalSizeX": 0.3})
    with open_slide(path) as slide:
        assert slide.channels == 3
        assert not any("damaged" in note for note in slide.notes)
    data = path.read_bytes()
    text = data[data.index(b"<?xml") : data.index(b"</OME>") + 6]
    spoilt = text[:-60] + b" " * 60 if how == "cut off" else text.replace(b"<Pixels", b"xPixels")
    path.write_bytes(data.replace(text, spoilt))
    with open_slide(path) as slide:
        assert slide.channels == 1
        assert any(note.startswith("warning: its OME-XML is damaged") for note in slide.notes)
