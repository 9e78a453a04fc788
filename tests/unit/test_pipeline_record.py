"""The record of a unit: however much there is to tell of it, it can be written and is believed."""

from __future__ import annotations

import numpy as np
import pytest

from tilepipe.infer.coverage import MOST_BOXES, boxes_json
from tilepipe.pipeline.worker import MOST_DAMAGED, _counts, _damage
from tilepipe.slide import Damage, DamagedTile
from tilepipe.store import create_store
from tilepipe.tiling import Box

FAR = 9_999_999_999


def store_and_unit(tmp_path):
    store = create_store(
        str(tmp_path / "s.zarr"), channels=1, dtype=np.dtype("uint8"), extent=(64, 64), unit_px=64
    )
    return store, store.image(0).grid.unit(0, 0)


def test_a_record_of_many_classes_much_damage_and_many_parts(tmp_path):
    """None of them is beyond what happens; all of them together once failed the unit for good."""
    far = Box(234567, 123456, 234567 + 2048, 123456 + 2048)
    tiles = [DamagedTile(0, 123456 + n, far, "cannot be decoded: " + "z" * 181) for n in range(20)]
    facts = {
        "damaged": [str(tile) for tile in tiles],
        "counts": {str(value): 65536 for value in range(256)},
        "computed": boxes_json([far] * MOST_BOXES),
    }
    store, unit = store_and_unit(tmp_path)
    journal = store.journal(None, "f" * 64)
    journal.write("segment", 0, unit, checksum="0" * 16, facts=facts)
    assert journal.recorded("segment", 0)[0, 0].facts == facts


@pytest.mark.parametrize("said", ["z", "\0", '"\\', "µ", "漢", "𝄞", "\udc80", "\n"])
def test_the_largest_record_is_written_and_believed(tmp_path, said):
    store, unit = store_and_unit(tmp_path)

    class Hurt:
        damage = Damage()

    for index in range(3 * MOST_DAMAGED):
        Hurt.damage.add(DamagedTile(0, FAR - index, unit.box, said * 5000))
    far = Box(FAR - 9, FAR - 9, FAR, FAR)
    facts = {
        **_damage(Hurt, unit, unit.box, level=0),
        "counts": _counts(np.repeat(np.arange(256, dtype=np.uint8), 4096).reshape(1024, 1024)),
        "computed": boxes_json([far] * MOST_BOXES),
        "backend_refused": "OpenVINO cannot take this network: " + "漢" * 300,
        "oom_events": ["retried with the smaller batch or tile of another lane"] * 20,
    }
    journal = store.journal(None, "f" * 64)
    journal.write("segment", 0, unit, checksum="0" * 16, facts=facts)
    record = journal.recorded("segment", 0)[0, 0]
    assert journal.rejected == []
    assert record.facts == facts
    assert record.facts["n_damaged"] == 3 * MOST_DAMAGED
    assert len(record.facts["damaged"]) == MOST_DAMAGED
