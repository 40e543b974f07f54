"""Damaged and forged artifacts in a process of bounded memory and time: see `fuzz_artifact.py`."""

import subprocess
import sys
from pathlib import Path


def test_no_artifact_does_harm(tmp_path, request):
    cases = request.config.getoption("--fuzz")
    command = [sys.executable, Path(__file__).with_name("fuzz_artifact.py"), tmp_path, "--cases", str(cases)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300 + cases)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert f"{cases} cases" in run.stdout and " 0 failures" in run.stdout
