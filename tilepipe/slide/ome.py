"""Which image of an OME-XML is which of the TIFF's series.

Numbers do not say it: images whose files are missing are no series to tifffile.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element


def nodes(parent: Element, name: str) -> Iterator[Element]:
    """All nodes of this name below ``parent``, whatever the namespace."""
    return (node for node in parent.iter() if node.tag.rsplit("}", 1)[-1] == name)


def ome_image(series: Any) -> Element | None:
    """Return the Image that a series shows: the one that lists its first page.

    Raises xml.etree.ElementTree.ParseError if the XML is damaged.
    """
    text = series.parent.ome_metadata or series.keyframe.description
    root = ElementTree.fromstring(text)
    page = next((page for page in series._pages if page is not None), None)
    if page is None:
        return None
    for image in nodes(root, "Image"):
        if any(_lists(data, page, series.parent, root) for data in nodes(image, "TiffData")):
            return image
    return None


def is_damaged(tiff: Any) -> bool:
    """Tell whether a file holds an OME-XML that nobody can read, cut off or with changed bytes."""
    text = tiff.pages.first.description
    if not isinstance(text, str) or "<OME" not in text:
        return False
    try:
        ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        return True
    return False


def channels_in_turn(series: Any) -> int:
    """Return how many channels an OME-XML tells of that leaves out which page holds which.

    They are the pages in turn: so libvips is told to write OME-TIFFs, and Bio-Formats reads them.
    To tifffile these pages are images of their own. 1 where the XML says otherwise, or nothing.
    """
    if not series.parent.is_ome:
        return 1
    try:
        root = ElementTree.fromstring(series.parent.ome_metadata)
        images = list(nodes(root, "Image"))
        (pixels,) = nodes(root, "Pixels")
        planes = int(pixels.get("SizeZ", 1)) * int(pixels.get("SizeT", 1))
        channels = int(pixels.get("SizeC", 1))
    except (ElementTree.ParseError, ValueError):
        return 1
    is_plain = len(images) == 1 and planes == 1 and next(nodes(pixels, "TiffData"), None) is None
    return channels if is_plain else 1


def _lists(data: Element, page: Any, opened: Any, root: Element) -> bool:
    """Tell whether a TiffData names ``page``; the file that was opened may have a new name."""
    first = int(data.get("IFD", 0))
    count = data.get("PlaneCount", data.get("NumPlanes", "1" if "IFD" in data.attrib else None))
    if page.index < first or (count is not None and page.index >= first + int(count)):
        return False
    uuid = next(nodes(data, "UUID"), None)
    if uuid is None or uuid.text == root.get("UUID"):
        return page.parent is opened
    name = uuid.get("FileName", "").replace("\\", "/").rpartition("/")[2]
    return name.lower() == page.parent.filename.lower()
