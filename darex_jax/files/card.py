"""Model cards (README.md) for deltas, adapters, restored and merged models."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darex_jax.core.errors import DarexError

CARD = "README.md"
CACHED = re.compile(r"models--(?:([\w.-]+?)--)?([\w.-]+)", re.ASCII)
USES = {
    "darex_jax": "A pruned delta. With its base it restores the fine-tuned model:\n\n"
    "    darex apply BASE delta.safetensors OUT",
    "peft": "A PEFT adapter made from a pruned delta:\n\n"
    "    peft.PeftModel.from_pretrained(model, DIRECTORY)",
    "transformers": "A model restored from its base and the pruned delta of a fine-tune.",
}


def model_card(
    facts: Mapping[str, Any],
    library: str,
    *,
    base_model: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A model card in Markdown with the hub's metadata header.

    Args:
      facts: of the delta, from `files.contents.contents`.
      library: "darex_jax" for a delta, "peft" for an adapter, "transformers" for a restored model.
      base_model: its name on the hub, or another name.
      measured: reports of `darex eval --json`.
    Raises: DarexError for an invalid report.
    """
    metadata = {
        **({"base_model": base_model} if base_model else {}),
        "library_name": library,
        "tags": ["delta-pruning", facts["method"]],
    }
    how = ", ".join([facts["method"], *(f"{k} {_text(v)}" for k, v in facts["made_with"].items())])
    rows = [
        ("base", base_model or "not stated"),
        ("method", how),
        (
            "delta",
            f"{facts['bytes']:,} bytes, {facts['bytes_per_parameter']:.4g} per pruned parameter",
        ),
        ("numbers stored", f"{facts['survivors']:,} of {facts['entries']:,}"),
        ("digest", facts["digest"]),
        ("made with", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in metadata.items()), "---", ""]
    lines += [USES[library], "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    found = [row for report in measured for row in _results(report)]
    if found:
        lines += ["", "Measured with `darex eval`:", "", "| task | split | metric | | examples |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in found]
    return "\n".join([*lines, ""])


def merged_card(method: str, deltas: Sequence[str], options: Mapping[str, Any], *, base_model: str) -> str:
    """The card of a merged model. Args: deltas: their names; options: of `merge`."""
    metadata = {"base_model": base_model, "library_name": "transformers", "tags": ["delta-pruning", "merge"]}
    stated = {k: v for k, v in options.items() if v is not None and k != "key"}
    weights = stated.pop("weights", None) or [1.0] * len(deltas)
    how = ", ".join([method, *(f"{k} {_text(v)}" for k, v in stated.items())])
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in metadata.items()), "---", ""]
    lines += [
        f"A merge of {len(deltas)} fine-tunes of {_cell(base_model)} by `darex merge`: {_cell(how)}.",
        "",
    ]
    lines += ["| delta | weight |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {w:g} |" for name, w in zip(deltas, weights, strict=True)]
    return "\n".join([*lines, ""])


def hub_name(path: Path) -> str:
    """The name of a base: its name on the hub if it is in the hub's cache, else its folder's name.

    `_name_or_path` in its config.json is not used: it names the model that the base was trained from.
    """
    for folder in path.resolve().parts:
        if found := CACHED.fullmatch(folder):
            return "/".join(filter(None, found.groups()))
    return path.resolve().name


def _results(report: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    try:
        rows = report.get("deltas", [report])
        return [
            (row["task"], report["split"], row["metric_name"], f"{row['metric']:.4f}", f"{row['n']:,}")
            for row in rows
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DarexError("a report for the card must be output of darex eval --json.") from error


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    """Escapes a value for one table cell, so that it cannot start a row, cell or tag."""
    line = " ".join(str(value).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
