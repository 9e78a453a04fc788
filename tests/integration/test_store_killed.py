"""A writer that dies by SIGKILL at any moment: what the journal says is done, is there."""

import random
import subprocess
import sys
import time

import numpy as np

from tilepipe.store import create_store, open_store

WRITER = """
import sys
import numpy as np
from tilepipe.store import open_store
store = open_store(sys.argv[1], writable=True)
store.clean_partial()
level, journal = store.image(0), store.journal(None, "f")
done = journal.recorded("ingest", 0)
assert not journal.rejected
print("begun", flush=True)
for unit in level.grid:
    if (unit.iy, unit.ix) in done:
        continue
    pixels = np.random.default_rng(level.grid.index(unit.iy, unit.ix)).integers(
        0, 255, (3, *unit.box.shape), np.uint8
    )
    summed = level.write_unit(unit, pixels)
    journal.write("ingest", 0, unit, checksum=summed)
"""


def test_killed_writers_leave_a_store_that_goes_on(tmp_path):
    store = create_store(
        str(tmp_path / "a.zarr"), channels=3, dtype="uint8", extent=(900, 800), unit_px=48
    )
    dice = random.Random(0)
    level = store.image(0)
    counts, seen = [], set()
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.location], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"begun\n"
        time.sleep(dice.uniform(0.02, 0.4))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        journal = open_store(store.location).journal(None, "f")
        done = journal.recorded("ingest", 0)
        assert not journal.rejected
        for iy, ix in set(done) - seen:
            assert level.checksum(level.grid.unit(iy, ix)) == done[iy, ix].checksum
        seen |= set(done)
        counts.append(len(done))
    assert counts == sorted(counts)
    assert len(seen) == counts[-1]  # no record is ever lost
    subprocess.run([sys.executable, "-c", WRITER, store.location], check=True)
    assert len(open_store(store.location).journal(None, "f").recorded("ingest", 0)) == len(
        level.grid
    )
    assert not list(tmp_path.rglob("*.partial"))
    for unit in level.grid:
        expected = np.random.default_rng(level.grid.index(unit.iy, unit.ix)).integers(
            0, 255, (3, *unit.box.shape), np.uint8
        )
        np.testing.assert_array_equal(level.read(unit.box), expected)
