"""A process that has imported everything and forks: each child is a fresh ``tilepipe``, ``dask
worker`` or ``dask scheduler`` process in a fraction of a second, to be killed at will.

Requests come as JSON lines on stdin, replies go to stdout. Children die with it.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import tempfile

COMMANDS = {
    "tilepipe": "tilepipe.cli.main",
    "worker": "distributed.cli.dask_worker",
    "scheduler": "distributed.cli.dask_scheduler",
}
IMPORTS = (
    *COMMANDS.values(),
    "torch",
    "torch._dynamo",
    "tifffile",
    "imagecodecs",
    "obstore",
    "zarr",
    "distributed",
    "distributed.http.scheduler.api",
    "tilepipe.cli.run",
    "tilepipe.cli.finish",
    "tilepipe.cli.ingest",
    "tilepipe.pipeline.run",
    "tilepipe.infer",
    "tilepipe.models",
    "tilepipe.store.remote",
)


def child(request):
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["env"])
    tempfile.tempdir = None  # TMPDIR may be another now
    os.chdir(request["cwd"])
    # Dask reads its environment when it is imported.
    import dask

    dask.config.refresh()
    if "TEST_FULL_UNDER" in request["env"]:
        fill_disk(request["env"]["TEST_FULL_UNDER"])
    if "TEST_STALLS_WHILE" in request["env"]:
        stall(request["env"]["TEST_STALLS_WHILE"])
    if "TEST_NOT_MOUNTED" in request["env"]:
        hide(request["env"]["TEST_NOT_MOUNTED"])
    if "TEST_OTHER_TILEPIPE" in request["env"]:
        pretend_another_tilepipe(request["env"]["TEST_OTHER_TILEPIPE"])
    sys.argv = [request["command"], *request["argv"]]
    code = 70
    try:
        importlib.import_module(COMMANDS[request["command"]]).main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def fill_disk(root):
    """Let this process's own durable writes under a folder fail as on a full disk."""
    import errno

    from tilepipe.store.files import LocalFiles

    put = LocalFiles.put

    def refuse(self, key, value, *, durable=False):
        if str(self.root) == root:
            from tilepipe.store.explain import explained

            with explained(self.location, f"write {key}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, key, value, durable=durable)

    LocalFiles.put = refuse


def stall(flag):
    """Let this process hang with a unit of a mask that it has computed while a file is there."""
    import pathlib
    import time

    from tilepipe.infer import Engine

    segment = Engine.segment

    def late(self, *args, **options):
        found = segment(self, *args, **options)
        pathlib.Path(f"{flag}.reached").touch()
        while pathlib.Path(flag).exists():
            time.sleep(0.01)
        return found

    Engine.segment = late


def hide(path):
    """Let this process not see a file, as on a machine that lacks the file system it lies on."""
    import errno
    import io

    real = io.open

    def refuse(file, *args, **options):
        if isinstance(file, str | os.PathLike) and os.fspath(file) == path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return real(file, *args, **options)

    io.open = refuse


def pretend_another_tilepipe(version):
    """Let this process have another tilepipe, or none (""), that would do units another way."""
    import distributed.versions

    from tilepipe.packages import version_of

    real = importlib.metadata.distribution

    def distribution(name):
        if name != "tilepipe":
            return real(name)
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return type("Other", (), {"version": version})

    importlib.metadata.distribution = distribution
    distributed.versions._version_cached.cache_clear()
    version_of.cache_clear()
    if not version:
        for name in [name for name in sys.modules if name.split(".")[0] == "tilepipe"]:
            del sys.modules[name]
        sys.modules["tilepipe"] = None
        return
    import tilepipe.pipeline.worker

    def run_units(ticket, stage, units):
        print("DID A UNIT", flush=True)
        raise OSError("by another tilepipe")

    tilepipe.pipeline.worker.run_units = run_units


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS:
        importlib.import_module(name)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            reply = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                replies.close()
                child(request)
            reply = {"pid": pid}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
