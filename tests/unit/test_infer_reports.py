"""OpenVINO's converter must not report usage to a server."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_the_converter_runs_without_its_usage_reports():
    pytest.importorskip("openvino")
    code = (
        "from tilepipe.infer.openvino import import_openvino\n"
        "import_openvino().convert_model\n"
        "import openvino.tools.ovc.telemetry_utils as used\n"
        "assert used.tm.__name__ == 'openvino.tools.ovc.telemetry_stub', used.tm.__name__\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
