"""A short run of the fuzzer, and proof that it notices what it looks for."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def campaign(*arguments):
    """Run the campaign as its own command."""
    command = [sys.executable, "-m", "tests.fuzz.campaign", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_short_run_finds_nothing():
    ended = campaign("-n", 240, "--first", 1_000_000)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "tiff", "store", "store04", "journal", "job", "checkpoint",
    ]  # fmt: skip
    for line in lines:
        assert " 0 findings" in line
        # Damage that is always refused, or never, would test little.
        executions = int(line.split(": ")[1].split()[0])
        refused = int(line.split(" ok, ")[1].split()[0])
        assert 0 < refused < executions, line


def test_misbehaviour_is_noticed(tmp_path):
    kinds = ("fine", "refused", "crash", "hang", "memory", "pixels", "abort")
    said = [random.Random(f"planted:{seed}").choice(kinds) for seed in range(60)]
    # A stretch of seeds with all of them, and not too many that hang.
    first = next(
        k for k in range(50)
        if set(said[k : k + 10]) == set(kinds) and said[k : k + 10].count("hang") == 1
    )  # fmt: skip
    ended = campaign("--only", "planted", "--first", first, "-n", 10, "--seconds", 1,
                     "--megabytes", 100, "--out", tmp_path)  # fmt: skip
    assert ended.returncode == 1, ended.stdout + ended.stderr
    records = (tmp_path / "findings.jsonl").read_text().splitlines()
    found = {record["seed"]: record["detail"] for record in map(json.loads, records)}
    signs = {
        "crash": "KeyError: 'planted' at targets.py",
        "hang": "hangs: more than 1 s",
        "memory": "memory grew by 150 MB",
        "pixels": "planted pixels",
        "abort": "the process died (-6)",
    }
    for seed in range(first, first + 10):
        if said[seed] in signs:
            assert found[seed].startswith(signs[said[seed]]), (said[seed], found[seed])
        else:
            assert seed not in found


def test_damage_depends_on_the_seed_alone():
    spec = importlib.util.spec_from_file_location("mutate", Path(__file__).with_name("mutate.py"))
    mutate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    tiff = b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x05\0\0\0\0\0\0\0" + bytes(40)
    made = [
        lambda rng: mutate.damage_bytes(bytes(range(256)), rng),
        lambda rng: mutate.damage_tiff(tiff, rng),
        lambda rng: repr(mutate.damage_json({"a": [1, {"b": "c"}], "d": 2.5}, rng)),
        lambda rng: mutate.damage_text('a = 1\nb = "x"\n', rng),
    ]
    for make in made:
        results = [make(random.Random(f"x:{seed}")) for seed in range(50)]
        assert results == [make(random.Random(f"x:{seed}")) for seed in range(50)]
        assert len(set(results)) > 20
