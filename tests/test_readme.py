"""The README's first program runs as it stands."""

import re
from pathlib import Path


def test_the_first_program_runs():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    program = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    names: dict = {}
    exec(program, names)
    kept = (names["gentler"]["layer"]["weight"] != 0).mean()
    assert 0.005 < kept < 0.015
