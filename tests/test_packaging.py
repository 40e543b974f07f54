"""What is beside the code: the wheel, its installation, and the files that describe the project."""

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from tests.test_structure import LAYERS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of other folders of the checkout, which are no part of the package.
OTHERS = ("tests/conftest.py", "tests/test_packaging.py", "experiments/smollm2.py", "benchmarks/mask.py")


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Of the checkout, to build from: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "darex_jax", copy / "darex_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *OTHERS):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, copy)
    (path,) = out.iterdir()
    return path


def test_the_wheel_holds_the_package_alone(wheel, copy):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        described = f"darex_jax-{PROJECT['version']}.dist-info"
        metadata = message_from_bytes(files.read(f"{described}/METADATA"))
    code = {name for name in names if not name.startswith(f"{described}/")}
    package = {p.relative_to(copy).as_posix() for p in (copy / "darex_jax").rglob("*") if p.is_file()}
    assert code == package and {"darex_jax/py.typed", "darex_jax/__init__.pyi"} <= code
    assert f"{described}/licenses/LICENSE" in names
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Version"] == PROJECT["version"]
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License")]


def test_an_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    """In an environment of its own, to which the packages that the tests run with are lent, but not the
    checkout that they may be installed from.
    """
    venv.create(tmp_path / "env", with_pip=False)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    options = ("install", "--no-deps", "--no-index", "--quiet", wheel)
    run(sys.executable, "-m", "pip", "--python", scripts / "python", *options)
    of_env = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(scripts / "python", "-c", of_env).strip())
    (own / "lent.pth").write_text(sysconfig.get_path("purelib"))
    # PYTHONPATH would put the checkout before the environment.
    outside = {
        "cwd": tmp_path,
        "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    }
    assert run(scripts / "darex", "--version", **outside).split()[-1] == PROJECT["version"]
    program = """
import sys
import jax
import darex_jax as dx
base = {"a": {"weight": jax.numpy.ones((64, 32))}}
delta = dx.compute_delta(jax.tree.map(lambda x: x + 0.5, base), base)
dx.save_delta("delta", jax.random.key(0), delta, 0.5, base=base)
assert (dx.load_delta("delta")["a"]["weight"] == dx.prune(jax.random.key(0), delta, 0.5)["a"]["weight"]).all()
for name in dx.__all__:
    getattr(dx, name)
print(dx.__file__)
"""
    assert run(scripts / "python", "-c", program, **outside).strip() == str(own / "darex_jax/__init__.py")
    assert "pruned" in run(scripts / "darex", "inspect", "delta", **outside)


def test_the_environment_is_of_this_version():
    """`make test` installs again where pyproject.toml has changed."""
    assert importlib.metadata.version("darex_jax") == PROJECT["version"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"] == [{"name": "The darex_jax authors"}]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"] and len(paper["authors"]) == 6


def test_the_changelog_has_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[:2] == ["Unreleased", PROJECT["version"]]


def test_hooks_run_what_make_lint_runs():
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    commands = [line.replace("$(BIN)", ".venv/bin") for line in rule[1].replace("\t", "").splitlines()]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == commands
    for hook in repo["hooks"]:
        assert hook["language"] == "system" and hook["always_run"] and not hook["pass_filenames"]


def test_contributing_draws_the_folders():
    drawn = re.findall(r"^ {4}( *)(\w+)/ ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert tuple(name for indent, name in drawn if indent) == LAYERS
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.iterdir())
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }  # fmt: skip
    assert {name for indent, name in drawn if not indent} | {"darex_jax"} == folders
