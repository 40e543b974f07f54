"""The README's programs run as they stand."""

import re
from pathlib import Path


def run_program_with(text):
    """The variables of the one program that has this text in it."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (program,) = (p for p in re.findall(r"```python\n(.*?)```", readme, re.S) if text in p)
    names: dict = {}
    exec(program, names)
    return names


def test_pruning():
    names = run_program_with("dx.prune(jax.random.key(0), delta")
    kept = (names["gentler"]["layer"]["weight"] != 0).mean()
    assert 0.005 < kept < 0.015


def test_adamr():
    names = run_program_with("dx.adamr")
    assert float(names["params"]["head"]["weight"][0, 0]) < 0 and names["params"]["body"]["weight"].shape == (
        8,
        8,
    )
