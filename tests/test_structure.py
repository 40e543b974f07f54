"""The package structure: each layer imports only lower layers, and no public name is also a module."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import darex_jax

ROOT = Path(darex_jax.__file__).parent
LAYERS = (
    "core", "parts", "methods", "merging", "q", "models", "files", "bank", "tasks", "training", "evaluation",
    "choosing", "runs", "study",
    "cli",
)  # fmt: skip


def imported(file):
    """Every darex_jax module that a file imports, including inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_layers_import_only_lower_layers():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(LAYERS)
    for height, layer in enumerate(LAYERS):
        allowed = LAYERS[: height + 1]
        for file in (ROOT / layer).rglob("*.py"):
            for module in imported(file):
                package, *rest = module.split(".")
                if package == "darex_jax":
                    assert rest and rest[0] in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_no_public_name_is_a_module():
    """A module imported as `darex_jax.x` becomes the attribute x of the package and would hide it."""
    modules = {path.stem for path in ROOT.iterdir()}
    assert not modules & set(darex_jax.__all__)
    for name in darex_jax.__all__:
        assert callable(getattr(darex_jax, name))


def test_the_algebra_needs_few_packages():
    """Deltas, masks, pruning and format 1 work with the package's own dependencies only."""
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    code = f"""
import sys
modules = {{"orbax": "orbax", "google-re2": "re2", "scikit-learn": "sklearn", "tomli_w": "tomli_w"}}
names = [requirement.split(">")[0].split("=")[0] for requirement in {extras["all"]!r}]
for name in names:
    sys.modules[modules.get(name, name.split("-")[0])] = None  # an import of it fails
import jax, tempfile, pathlib
import darex_jax as dx
base = {{"a": {{"weight": jax.numpy.ones((64, 32))}}}}
delta = dx.compute_delta(jax.tree.map(lambda x: x + 0.5, base), base)
pruned = dx.prune(jax.random.key(0), delta, 0.5)
path = pathlib.Path(tempfile.mkdtemp()) / "delta"
dx.save_delta(path, jax.random.key(0), delta, 0.5, base=base)
assert (dx.load_delta(path)["a"]["weight"] == pruned["a"]["weight"]).all()
dx.apply_delta(base, dx.magnitude(delta, dx.Budget(drop_rate=0.9)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_reports_missing_packages():
    code = "import sys; sys.modules['click'] = None; from darex_jax.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "darex: click is not installed; it comes with pip install 'darex_jax[all]'\n"
