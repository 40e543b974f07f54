"""The package's shape: each layer knows only the layers under it, and no name stands for two things."""

import ast
from pathlib import Path

import darex_jax

ROOT = Path(darex_jax.__file__).parent
LAYERS = (
    "core", "parts", "methods", "q", "models", "files", "tasks", "training", "evaluation", "runs", "cli",
)  # fmt: skip


def imported(file):
    """Every darex_jax module a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_layers_know_only_what_is_under_them():
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
