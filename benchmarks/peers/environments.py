"""A virtual environment for each peer, made once and again when its requirements change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from catalogue import Peer

FOLDER = Path(__file__).resolve().parent / ".envs"


class InstallError(RuntimeError):
    """A peer that cannot be installed; the message is pip's last word, the log has the rest."""


def python_of(peer: Peer, folder: Path = FOLDER) -> Path:
    """Return the interpreter of a peer's environment, there or not."""
    return folder / peer.name / "bin" / "python"


def is_ready(peer: Peer, folder: Path = FOLDER) -> bool:
    """Tell whether the environment holds what the catalogue asks for."""
    stamp = folder / peer.name / "ready.txt"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _text(peer)


def make(peer: Peer, *, timeout_s: float, folder: Path = FOLDER) -> Path:
    """Make the environment unless it is ready; returns its interpreter.

    Raises InstallError if pip fails or takes longer than ``timeout_s``.
    """
    place, log = folder / peer.name, folder / f"{peer.name}.log"
    if is_ready(peer, folder):
        return python_of(peer, folder)
    shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        steps = (
            [sys.executable, "-m", "venv", "--without-pip", str(place)],
            # The pip of the environment we run in: none needs to be installed in each.
            [sys.executable, "-m", "pip", "--python", str(python_of(peer, folder)), "install",
             "--quiet", "--no-input", *peer.requirements],
        )  # fmt: skip
        for step in steps:
            try:
                subprocess.run(
                    step, check=True, stdout=out, stderr=subprocess.STDOUT, timeout=timeout_s
                )
            except subprocess.TimeoutExpired as error:
                raise InstallError(f"not installed within {timeout_s:.0f} s; see {log}") from error
            except subprocess.CalledProcessError as error:
                raise InstallError(f"{_last_error(log)}; see {log}") from error
    (place / "ready.txt").write_text(_text(peer), encoding="utf-8")
    return python_of(peer, folder)


def _text(peer: Peer) -> str:
    return "\n".join((*peer.requirements, sys.version.split()[0]))


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "ERROR" in line]
    return lines[-1] if lines else "pip failed"
