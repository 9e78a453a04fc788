"""The graph of units: each runs once, after what it needs, in any order and from any state."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.schedule import Dag, Stage
from tilepipe.schedule.dag import DONE
from tilepipe.tiling import Grid, plan_tiles
from tilepipe.tiling.grid import level_extents


@st.composite
def jobs(draw):
    """Stages of a real job: image pyramid, mask pyramid, perhaps a gate, in any proportions."""
    extent = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    alignment = draw(st.sampled_from([1, 2, 4]))
    unit_px = alignment * draw(st.integers(3, 16))
    level_count = draw(st.integers(1, 4))
    image = level_extents(extent, smallest_px=8)[:level_count]
    level = draw(st.integers(0, len(image) - 1))
    kind = draw(st.sampled_from(["ingest", "copied", "there already"]))
    plan = None
    if kind != "ingest":
        margin = draw(st.sampled_from([0, 2 * alignment]))
        halo = margin + alignment * draw(st.integers(0, 3))
        least = 2 * halo + alignment
        plan = plan_tiles(
            image[level],
            unit_px=unit_px,
            context_px=halo,
            alignment_px=alignment,
            margin_px=margin,
            least_input_px=least,
            input_step_px=alignment,
            input_px=draw(st.none() | st.integers(0, 8).map(lambda n: least + n * alignment)),
            mode=draw(st.sampled_from(["exact", "blended"])),
        )
    return build_stages(
        Layout(
            image=() if kind == "there already" else image,
            label=() if plan is None else image[level:],
            unit_px=unit_px,
            level=level,
            plan=plan,
            gate=plan is not None and draw(st.booleans()),
            band=draw(st.integers(0, 5)),
            share=draw(st.sampled_from([None, lambda box: (box.y0 + box.x0) % 3 / 2])),
            objects_halo_px=draw(st.sampled_from([None, 1, 3])),
        )
    )


def nodes_of(stages):
    return [(n, i) for n, stage in enumerate(stages) for i in range(len(stage.grid))]


def needs_of(stages, node):
    stage = stages[node[0]]
    whole = () if stage.after is None else range(len(stages[stage.after].grid))
    return {*stage.needs(stage.grid.at(node[1])), *((stage.after, index) for index in whole)}


@given(jobs())
@settings(max_examples=50, deadline=None)
def test_who_needs_a_unit_is_offered_when_that_unit_is_done(stages):
    fed = defaultdict(set)
    for node in nodes_of(stages):
        stage = stages[node[0]]
        for other in stage.feeds(stage.grid.at(node[1])):
            fed[node].add(other)
    for node in nodes_of(stages):
        needs = needs_of(stages, node)
        assert node not in needs
        assert stages[node[0]].root == (not needs) or not stages[node[0]].root
        for need in needs:
            # A stage that is needed as a whole offers what needs it by itself.
            assert node in fed[need] or stages[node[0]].after == need[0]


@given(jobs(), st.data())
@settings(max_examples=50, deadline=None)
def test_every_order_runs_each_unit_once_after_what_it_needs(stages, data):
    dag = Dag(stages)
    # What an earlier run recorded may be any set whatever, even one no run could leave.
    share = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    recorded = {
        n: [i for i in range(len(stage.grid)) if rng.random() < share]
        for n, stage in enumerate(stages)
    }
    dag.start(recorded)
    done = {(n, i) for n, indices in recorded.items() for i in indices}
    ran = []
    running = []
    while True:
        wants_device = bool(rng.integers(2)) or not running
        roots = dag.backlog < 2 or bool(rng.integers(2))
        taken = dag.take(device=wants_device, roots=roots, limit=lambda *_: int(rng.integers(1, 5)))
        if taken is not None:
            number, units = taken
            assert roots or stages[number].on_device or not stages[number].root
            assert wants_device or not dag.needs_device(number, units)
            for unit in units:
                assert needs_of(stages, (number, unit)) <= done
                running.append((number, unit))
        elif not running:
            break
        while running and (taken is None or rng.random() < 0.5):
            node = running.pop(int(rng.integers(len(running))))
            if rng.random() < 0.2:
                dag.give_back(node)  # its worker was lost
            else:
                assert node not in done
                assert dag.complete(node)
                assert not dag.complete(node)
                done.add(node)
                ran.append(node)
    assert dag.finished
    assert dag.exhausted
    assert len(ran) == len(set(ran))
    assert done == set(nodes_of(stages))
    assert [dag.count(n) for n in range(len(stages))] == [(len(s.grid),) * 2 for s in stages]


@given(jobs(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_what_needs_a_failed_unit_is_not_run_and_the_rest_is(stages, seed):
    rng = np.random.default_rng(seed)
    dag = Dag(stages)
    dag.start({})
    ran, failed = set(), set()
    while (taken := dag.take(device=True, limit=lambda *_: 3)) is not None:
        for unit in taken[1]:
            node = (taken[0], unit)
            if rng.random() < 0.1:
                failed.add(node)
                dag.fail(node, "broken")
            else:
                ran.add(node)
                dag.complete(node)
    assert dag.exhausted
    assert set(dag.failed) == failed
    assert dag.finished == (not failed)
    left = set(nodes_of(stages)) - ran - failed
    assert dag.blocked == len(left)
    for node in left:
        assert needs_of(stages, node) & (failed | left)


def test_only_wanted_units_run():
    stages = [Stage("ingest", 0, Grid((40, 40), 10), root=True)]
    dag = Dag(stages)
    dag.start({0: [3]}, wanted={0: {3, 5, 6}})
    assert dag.take(device=True, limit=lambda *_: 99) == (0, [5, 6])
    assert not dag.finished
    dag.complete((0, 5))
    dag.complete((0, 6))
    assert dag.finished
    assert dag.skipped == 13
    assert dag.count(0) == (3, 16)


def test_nearest_to_a_finished_pyramid_goes_first():
    stages = [
        Stage("a", 0, Grid((10, 30), 10), rank=0, feeds=lambda u: [(1, u.ix)], root=True),
        Stage("b", 0, Grid((10, 30), 10), rank=1, needs=lambda u: [(0, u.ix)], on_device=True),
    ]
    dag = Dag(stages)
    dag.start({})
    assert dag.take(device=True) == (0, [0])
    dag.complete((0, 0))
    assert dag.take(device=False) == (0, [1])
    assert dag.take(device=True) == (1, [0])


def test_a_million_units_take_a_megabyte():
    grid = Grid((1000, 1000), 1)
    dag = Dag([Stage("a", 0, grid, root=True)])
    dag.start({0: range(0, 10**6, 2)})
    assert sum(state.nbytes for state in dag._state) == 10**6
    assert dag.count(0)[0] == 500_000
    assert int((dag._state[0] == DONE).sum()) == 500_000
    assert not dag._ready[0]


def test_a_band_goes_down_before_the_next_begins():
    dag = Dag([Stage("ingest", 0, Grid((30, 50), 10), root=True, band=2)])
    dag.start({})
    order = [dag.take(device=True)[1][0] for _ in range(15)]
    assert order == [0, 1, 5, 6, 10, 11, 2, 3, 7, 8, 12, 13, 4, 9, 14]
    for unit in (4, 13, 1):
        dag.give_back((0, unit))
    assert [dag.take(device=True)[1][0] for _ in range(3)] == [1, 13, 4]
    assert dag.take(device=True) is None


def test_reading_on_waits_for_the_device():
    extent = (80, 80)
    plan = plan_tiles(
        extent,
        unit_px=16,
        context_px=4,
        alignment_px=4,
        margin_px=0,
        least_input_px=12,
        input_step_px=4,
        input_px=None,
        mode="exact",
    )
    layout = Layout(image=(extent,), label=(extent,), unit_px=16, level=0, plan=plan, band=2)
    dag = Dag(build_stages(layout))
    dag.start({})
    read = 0
    while dag.backlog < 3:
        number, (unit,) = dag.take(device=False, roots=True)
        dag.complete((number, unit))
        read += 1
    assert read < len(dag.stages[0].grid)
    assert dag.take(device=False, roots=False) is None
    assert dag.take(device=True, roots=False)[0] == 1
    assert dag.backlog == 2


def first_taken(stages, recorded, count):
    dag = Dag(stages)
    dag.start(recorded)
    taken = []
    while len(taken) < count:
        number, units = dag.take(device=True, limit=lambda *_: 1)
        taken += [(number, unit) for unit in units]
    return dag, taken


def test_what_the_devices_first_unit_needs_is_read_first():
    extent = (8 * 16, 8 * 16)
    plan = plan_tiles(
        extent, unit_px=16, context_px=2, alignment_px=1, margin_px=0, least_input_px=8,
        input_step_px=1,
    )  # fmt: skip
    stages = build_stages(Layout(
        image=level_extents(extent, smallest_px=64), label=(extent,), unit_px=16, level=0,
        plan=plan, band=6,
    ))  # fmt: skip
    segment = next(n for n, stage in enumerate(stages) if stage.name == "segment")
    _, taken = first_taken(stages, {}, 6)
    # The corner's neighbours, not a row of the band; the rest in its usual order, none twice.
    assert taken == [(0, 0), (0, 1), (0, 8), (0, 9), (0, 2), (0, 3)]
    # Taken up again where the first two masks are there: those of the third come first.
    recorded = {0: {0, 1, 2, 8, 9, 10}, 1: {0}, segment: {0, 1}}
    dag, taken = first_taken(stages, recorded, 4)
    assert taken == [(0, 3), (0, 11), (0, 4), (0, 5)]
    for node in taken[:2]:
        dag.complete(node)
    assert dag.backlog == 1
    assert dag.is_for_device
    # Another part's units are not this one's: nothing of it is for the device.
    dag = Dag(stages)
    dag.start({}, {0: {0}})
    assert not dag.is_for_device


def test_units_without_tissue_wait_for_no_device_and_hold_up_no_reading():
    """One column of units in four holds something, and of that a quarter."""
    plan = plan_tiles(
        (64, 256), unit_px=64, context_px=0, alignment_px=4, margin_px=0, least_input_px=8,
        input_step_px=4,
    )  # fmt: skip
    layout = Layout(
        image=(),
        label=((64, 256),),
        unit_px=64,
        level=0,
        plan=plan,
        share=lambda box: 0.25 if box.x0 == 64 else 0.0,
    )
    stages = build_stages(layout)
    # As when the image is copied: units become ready one by one.
    stages = [replace(stages[0], root=False)]
    dag = Dag(stages)
    dag.start({})
    assert dag.backlog == 0.25
    assert not dag.needs_device(0, [0, 2, 3])
    assert dag.needs_device(0, [0, 1])
    assert dag.take(device=False, limit=lambda _, device: 1 if device else 9) == (0, [0, 2, 3])
    assert dag.take(device=False, limit=lambda *_: 9) is None
    assert not dag.exhausted
    assert dag.take(device=True, limit=lambda *_: 9) == (0, [1])
    assert dag.backlog == 0


def looks_per_unit(side, **layout):
    """Count what is asked of states and of tissue while a job of ``side`` x ``side`` units runs."""
    extents = level_extents((side * 16, side * 16), smallest_px=16)
    looks = 0

    def share(_):
        nonlocal looks
        looks += 1
        return 1.0

    class Counted(Dag):
        def is_done(self, node):
            nonlocal looks
            looks += 1
            return super().is_done(node)

    plan = plan_tiles(
        extents[0], unit_px=16, context_px=2, alignment_px=1, margin_px=0, least_input_px=5,
        input_step_px=1, input_px=8, mode="exact",
    )  # fmt: skip
    recorded = layout.pop("recorded", ())
    image = extents[:1] if recorded else ()
    dag = Counted(
        build_stages(
            Layout(
                image=image, label=extents, unit_px=16, level=0, plan=plan, share=share, **layout
            )
        )
    )
    dag.start({number: range(side * side) for number in recorded})
    while (taken := dag.take(device=True, roots=dag.backlog < 2)) is not None:
        for unit in taken[1]:
            dag.complete((taken[0], unit))
    assert dag.finished
    return looks / side**2


@pytest.mark.parametrize(
    "layout",
    [{"gate": True}, {"objects_halo_px": 1}, {"recorded": (0,)}],
    ids=["gate", "objects", "all was copied before a stop"],
)
def test_a_unit_costs_the_same_of_however_many(layout):
    few, many = looks_per_unit(8, **layout), looks_per_unit(16, **layout)
    assert many < 1.3 * few
