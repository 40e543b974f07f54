"""Prints the oldest packages that pyproject.toml allows, as requirements: `python tests/oldest.py`."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["all"]:
    print(requirement.replace(">=", "=="))
