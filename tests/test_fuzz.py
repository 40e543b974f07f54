"""Damaged and forged artifacts in a process of bounded memory and time: see `fuzz_artifact.py`."""

import subprocess
import sys
from pathlib import Path


def test_no_artifact_crashes_or_exhausts_a_reader(tmp_path, request):
    cases = request.config.getoption("--fuzz")
    command = [sys.executable, "-m", "tests.fuzz_artifact", tmp_path, "--cases", str(cases)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300 + cases)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert f"{cases} cases" in run.stdout and " 0 failures" in run.stdout
