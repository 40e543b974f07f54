"""A skipped test that nobody expects fails the run: `may_skip` in conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = ("cola", "mrpc", "sst2", "stsb")
LISTED = """
import pytest

@pytest.mark.skipif(True, reason="DAREX_SMOLLM2 does not name a folder made by experiments/smollm2.py")
def test_weights(): ...

@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb"])
def test_data(name):
    pytest.skip(f"no real {name} data: set DAREX_DATA_DIR")

@pytest.mark.xfail
def test_fails():
    assert False
"""
UNLISTED = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_of_a_package(n):
    pytest.importorskip("no_such_package")
"""
MODULE = """
import pytest

pytest.importorskip("another_package")
"""


def run(folder, files, *options, data):
    for name, text in files.items():
        (folder / name).write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", folder, "-c", os.devnull,
         *options, folder],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        env=os.environ | {"DAREX_DATA_DIR": str(data), "PYTEST_ADDOPTS": ""},
    )  # fmt: skip


def test_what_is_listed_may_be_skipped(tmp_path):
    done = run(tmp_path, {"test_a.py": LISTED}, data=tmp_path / "none")
    assert done.returncode == 0, done.stdout
    assert "5 skipped, 1 xfailed" in done.stdout and "may_skip" not in done.stdout


@pytest.mark.parametrize("workers", [0, 2])
def test_more_or_others_fail_the_run(tmp_path, workers):
    more = LISTED.replace("test_weights", "test_weights_again")
    files = {"test_a.py": LISTED, "test_b.py": UNLISTED, "test_c.py": more, "test_d.py": MODULE}
    done = run(tmp_path, files, "-n", str(workers), data=tmp_path)
    told = [line.partition("conftest.py: ")[2] for line in done.stdout.splitlines() if "may_skip" in line]
    assert done.returncode == 1, done.stdout
    assert sorted(told) == [
        "1 skipped, none may: could not import 'another_package': No module named 'another_package'",
        "2 skipped, at most 1 may: DAREX_SMOLLM2 does not name a folder made by experiments/smollm2.py",
        *(f"2 skipped, none may: no real {name} data: set DAREX_DATA_DIR" for name in DATA),
        "3 skipped, none may: could not import 'no_such_package': No module named 'no_such_package'",
    ]


def test_a_whole_module_may_not_be_skipped(tmp_path):
    """Alone it would end as a run without tests."""
    done = run(tmp_path, {"test_d.py": MODULE}, data=tmp_path)
    assert done.returncode == 1, done.stdout
