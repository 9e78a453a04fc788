"""The recipes of ``workflows/``: what can run on one machine runs, the rest is read."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from tilepipe.schedule.local import gpu_worker_specs
from tilepipe.spec import JobSpec

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


@pytest.fixture
def commands(tmp_path):
    """Run a script with stand-ins on its PATH; return each command they were called with."""
    told = tmp_path / "told"
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("tilepipe", "sbatch"):
        script = folder / name
        script.write_text(
            f"#!/bin/bash\nprintf '%s\\n' {name} \"$@\" --- >> {told}\n"
            f"[ {name} = tilepipe ] || echo '4711;cluster'\n"
        )
        script.chmod(0o755)

    def run(script, *argv, code=0, **env):
        told.write_text("")
        done = subprocess.run(
            ["bash", script, *map(str, argv)],
            env={"PATH": f"{folder}:{os.environ['PATH']}", **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return [part.strip("\n").split("\n") for part in told.read_text().split("---\n") if part]

    return run


def test_the_slurm_array_and_its_finish(commands, zygote, slide, flags, reference, equal, tmp_path):
    store = tmp_path / "out.zarr"
    everyone = {"SLIDE": str(slide), "STORE": str(store)}
    for task in (3, 1, 2):  # arrays need not begin at 0
        [command] = commands(
            WORKFLOWS / "slurm" / "array.sbatch",
            *flags,
            SLURM_ARRAY_TASK_ID=str(task),
            SLURM_ARRAY_TASK_MIN="1",
            SLURM_ARRAY_TASK_COUNT="3",
            **everyone,
        )
        assert command[-2:] == ["--part", f"{task - 1}/3"]
        zygote.run(*command[1:])
    [command] = commands(WORKFLOWS / "slurm" / "finish.sbatch", **everyone)
    zygote.run(*command[1:])
    equal(store, reference)


def test_slurm_submit_queues_the_finish_behind_the_array(commands):
    array, finish = commands(
        WORKFLOWS / "slurm" / "submit.sh", "a slide.svs", "out.zarr", 5, "--weights", "my w.pt"
    )
    assert "--array=0-4" in array
    assert array[-3].endswith("array.sbatch")
    assert array[-2:] == ["--weights", "my w.pt"]
    assert "--dependency=afterany:4711" in finish
    assert finish[-1].endswith("finish.sbatch")


def test_slurm_scripts_say_what_they_need(commands):
    assert commands(WORKFLOWS / "slurm" / "submit.sh", code=2) == []
    assert commands(WORKFLOWS / "slurm" / "array.sbatch", SLURM_ARRAY_TASK_ID="0", code=1) == []
    assert commands(WORKFLOWS / "multi-gpu" / "run.sh", "out", code=2) == []


def test_slurm_workers_through_dask_jobqueue():
    spec = importlib.util.spec_from_file_location("run_dask", WORKFLOWS / "slurm" / "run_dask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked, rest = module.parse(["--jobs", "8", "--queue", "gpu", "s.svs", "-o", "x", "--tile", "9"])
    assert rest == ["s.svs", "-o", "x", "--tile", "9"]
    _, rest = module.parse(["--jobs", "8", "s.svs", "--job", "job.toml"])
    assert rest == ["s.svs", "--job", "job.toml"], "an option of run, not --jobs cut short"
    options = module.cluster_options(asked)
    jobqueue = pytest.importorskip("dask_jobqueue.slurm")
    script = jobqueue.SLURMJob(
        scheduler="tcp://127.0.0.1:8786",
        name="w",
        **{key: value for key, value in options.items() if key != "scheduler_options"},
    ).job_script()
    assert "#SBATCH -p gpu" in script
    assert "#SBATCH --gres=gpu:1" in script
    assert "--nthreads 3" in script
    assert asked.jobs == 8


def test_kubernetes_manifests():
    yaml = pytest.importorskip("yaml")
    folder = WORKFLOWS / "kubernetes"
    service, scheduler, worker = yaml.safe_load_all((folder / "cluster.yaml").read_text())
    [job] = yaml.safe_load_all((folder / "job.yaml").read_text())
    for part in (scheduler, worker):
        template = part["spec"]["template"]
        assert part["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert service["spec"]["selector"] == scheduler["spec"]["template"]["metadata"]["labels"]
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    args = {
        part["metadata"]["name"]: part["spec"]["template"]["spec"]["containers"][0]["args"]
        for part in (scheduler, worker, job)
    }
    assert address in args["tilepipe-worker"]
    assert args["tilepipe-run"][-2:] == ["--scheduler", address]
    assert args["tilepipe-scheduler"][args["tilepipe-scheduler"].index("--port") + 1] == "8786"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    # What is passed on exists: dask's options, and ours.
    from distributed.cli.dask_scheduler import main as dask_scheduler
    from distributed.cli.dask_worker import main as dask_worker

    from tilepipe.cli.run import command

    for name, known in (
        ("tilepipe-worker", dask_worker),
        ("tilepipe-scheduler", dask_scheduler),
        ("tilepipe-run", command),
    ):
        options = {option for parameter in known.params for option in parameter.opts}
        options |= {option for parameter in known.params for option in parameter.secondary_opts}
        assert {arg for arg in args[name] if arg.startswith("-")} <= options


def test_several_gpus(commands, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script = WORKFLOWS / "multi-gpu" / "run.sh"
    [command] = commands(script, "results", "a.svs", "b c.svs")
    assert command[:6] == ["tilepipe", "run", "a.svs", "b c.svs", "-o", "results"]
    assert command[-2:] == ["--gpus", "all"]
    [command] = commands(script, "results", "a.svs", GPUS="0,2")
    assert command[-2:] == ["--gpus", "0,2"]
    spec = JobSpec.from_toml(WORKFLOWS / "multi-gpu" / "job.toml", gpus="0,2")
    devices = {
        worker["options"]["env"]["CUDA_VISIBLE_DEVICES"]
        for worker in gpu_worker_specs([0, 2]).values()
    }
    assert devices == {"0", "2"}
    assert spec.unit == 4096


def test_commands_in_the_readmes_exist():
    """Every option of tilepipe that a recipe names is one that it has."""
    from tilepipe.cli.run import command

    known = {option for parameter in command.params for option in parameter.opts}
    for readme in sorted(WORKFLOWS.glob("*/README.md")):
        if readme.parent.name not in ("slurm", "kubernetes", "multi-gpu"):
            continue
        for line in re.findall(r"tilepipe run [^`\n]*", readme.read_text()):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line
