"""Repeats a run from its manifest and compares digests, inputs and versions."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError
from darex_jax.files.checkpoint import MANIFEST, read_json
from darex_jax.runs.train import train_run
from darex_jax.tasks.table import Table
from darex_jax.training.loop import Recipe

PARTS = ("inputs", "versions", "platform")


def repeat_run(
    manifest: Path,
    *,
    base: Path | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[int, dict[str, Any]], None] = lambda steps, line: None,
) -> dict[str, Any]:
    """Repeats a training.

    Args:
      manifest: darex_manifest.json written by `train_run`, or its directory.
      base, data_dir: their current paths, for a training on --data that of the data; None: as they were.
      out: for the result of the repeat; None is a temporary folder.
      say, on_step: as for `train_run`.
    Returns: {"same": whether all digests agree, "outputs": {name: [digest of the repeat, whether it agrees]},
      "differences": [{"what", "then", "now"}, ...] in inputs, versions and platform}.
    Raises: FileError if the file does not exist; ValueError for a manifest of another command, or with
      options that this version does not have.
    """
    file = manifest / MANIFEST if manifest.is_dir() else manifest
    then = read_json(file)
    if then.get("command") != "train":
        raise DarexError(f"{file}: is of {then.get('command')!r}; only 'train' can be repeated.")
    missing = [part for part in (*PARTS, "outputs", "options") if not isinstance(then.get(part), dict)]
    if missing or not then["outputs"]:
        raise DarexError(f"{file}: is not of a finished run: it lacks {', '.join(missing or ['outputs'])}.")
    options = dict(then["options"])
    recipe_names = {field.name for field in dataclasses.fields(Recipe)}
    columns = {field.name for field in dataclasses.fields(Table)}
    arguments = set(inspect.signature(train_run).parameters) - {"out", "recipe", "table", "say", "on_step"}
    known = recipe_names | columns | arguments
    if other := sorted(known ^ options.keys()):
        raise DarexError(f"{file}: is of another version, with different options: {', '.join(other)}.")
    recipe = Recipe(**{name: options.pop(name) for name in recipe_names})
    source, folder = Path(options.pop("base")), options.pop("data_dir")
    own = {name: options.pop(name) for name in columns}
    options["table"] = None
    if own["data"] is not None:
        options["table"] = Table(**own | ({"data": str(data_dir)} if data_dir else {}))
        data_dir = None
        del options["task"]
    options["lora_targets"] = tuple(options["lora_targets"])
    options["data_dir"] = data_dir or (folder and Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        target = out or Path(scratch) / "repeat"
        train_run(base or source, target, recipe, **options, say=say, on_step=on_step)
        now = read_json(target / MANIFEST)
    outputs = {name: [digest, then["outputs"].get(name) == digest] for name, digest in now["outputs"].items()}
    differences = [
        {"what": f"{part}: {name}", "then": then[part].get(name), "now": now[part].get(name)}
        for part in PARTS
        for name in {**then[part], **now[part]}
        if then[part].get(name) != now[part].get(name)
    ]
    return {
        "same": all(same for _, same in outputs.values()),
        "outputs": outputs,
        "differences": differences,
    }
