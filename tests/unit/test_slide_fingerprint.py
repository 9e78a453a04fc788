"""Fingerprints: any change of the sampled content, size, shape or dtype shows."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import tifffile

from tilepipe.errors import SlideError
from tilepipe.slide import open_slide
from tilepipe.slide.fingerprint import fingerprint_file


def test_same_file_same_fingerprint(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((50, 40), np.uint8))
    with open_slide(tmp_path / "a.tif") as slide, open_slide(tmp_path / "a.tif") as again:
        first = slide.fingerprint()
        assert first == again.fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first["shape"] == [1, 50, 40]
    assert first["dtype"] == "uint8"
    assert first["size"] == (tmp_path / "a.tif").stat().st_size


def test_a_replaced_slide_is_noticed_even_with_the_same_time_and_size(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100_000))
    first = fingerprint_file(str(path))
    path.write_bytes(bytes(50_000) + b"x" + bytes(49_999))
    os.utime(path, ns=(first["mtime_ns"], first["mtime_ns"]))
    second = fingerprint_file(str(path))
    assert (second["size"], second["mtime_ns"]) == (first["size"], first["mtime_ns"])
    assert second["sha256"] != first["sha256"]


@pytest.mark.parametrize("where", [0, 4_999_999_999, 2_500_000_000 // 65536 * 65536])
def test_head_tail_and_size_of_a_large_file(tmp_path, where):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    first = fingerprint_file(str(path))
    with path.open("r+b") as file:
        file.truncate(5_000_000_001)
    assert fingerprint_file(str(path))["sha256"] != first["sha256"]
    with path.open("r+b") as file:
        file.truncate(5_000_000_000)
        file.seek(where)
        file.write(b"x")
    changed = fingerprint_file(str(path))["sha256"] != first["sha256"]
    assert changed or 0 < where < 4_999_000_000  # the middle is only sampled


def test_vanished_file(tmp_path):
    with pytest.raises(SlideError, match="cannot be read: No such file"):
        fingerprint_file(str(tmp_path / "none"))
