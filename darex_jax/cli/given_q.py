"""What `--q` of `darex prune` says: a number, a file of find-q, or an objective to choose it by."""

from pathlib import Path
from typing import Any

import click

from darex_jax.cli.show import byte_bar, point_bar, warn


def choose_given(
    base: Path, fine: Path, drop_rate: float, choice: Any, source: Any, quiet: bool
) -> tuple[Any, str, dict[str, str]]:
    """A q from the given inputs, how it was chosen, and digests of the fine-tuned model and the examples."""
    if choice.objective == "auto" and all(x is None for x in (source.task, source.text, source.table)):
        return None, "default: without --task, --text or --data, q is DARE's 1 - drop rate", {}
    from darex_jax.choosing.choose import choose_q

    with point_bar("choosing q", quiet) as on_value:
        found = choose_q(base, fine, drop_rate, choice, source, on_value)
    inputs = found["manifest"]["inputs"]
    digests = {"fine_weights": inputs["fine_weights"], "q_data": inputs["data"]}
    if "warning" in found:
        return found["q"], f"{found['objective']}, without success: {found['warning']}", digests
    what = f"{found['value_name']} {found['value']:.4f}" if "value" in found else "solved"
    return found["q"], f"{found['objective']}: {what} on {found['examples']} examples", digests


def read_q(
    text: str, drop_rate: float | None, base: Path, fine: Path, choice: Any, quiet: bool
) -> float | dict[str, float] | None:
    """Parses --q: a number, or a q file {"q": number or {name: number}}, for this drop rate if it has one.

    A file of find-q records its weights, mask and scope: other weights are refused before anything is
    written, another mask or scope gives a warning.
    """
    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).exists():
        raise click.BadParameter(f"{text!r} is neither a number nor a file.", param_hint="--q")
    from darex_jax.files.checkpoint import read_json

    content = read_json(Path(text))
    q, chosen_for = content.get("q"), content.get("drop_rate", drop_rate)
    if drop_rate is None and chosen_for is not None:
        raise click.BadParameter(
            f"{text} was chosen for a drop rate of {chosen_for}: pass --drop-rate {chosen_for}, not a size.",
            param_hint="--q",
        )
    if chosen_for != drop_rate:
        raise click.BadParameter(
            f"{text} was chosen for a drop rate of {chosen_for}, not {drop_rate}.", param_hint="--q"
        )
    if not (isinstance(q, int | float) or (isinstance(q, dict) and q)):
        raise click.BadParameter(f"{text} has no 'q'.", param_hint="--q")
    manifest = content.get("manifest")
    manifest = manifest if isinstance(manifest, dict) else {}
    inputs, options = (
        part if isinstance(part := manifest.get(name), dict) else {} for name in ("inputs", "options")
    )
    for what, path in (("base", base), ("fine", fine)):
        _check_weights(text, what, path, inputs.get(f"{what}_weights"), quiet)
    seeds = content.get("mask_seeds")
    if isinstance(seeds, list) and choice.seed not in seeds and seeds:
        warn(f"{text} was chosen with the mask of seed {', '.join(map(str, seeds))}, not {choice.seed}.")
    for name, given in (("include", list(choice.include)), ("exclude", list(choice.exclude))):
        chosen_with = options.get(name, given)
        if chosen_with != given:
            warn(f"{text} was chosen with --{name} {chosen_with or 'not given'}, not with {given}.")
    return q


def _check_weights(q_file: str, what: str, path: Path, digest: Any, quiet: bool) -> None:
    """Raises: BadParameter if the q file records other weights than those at `path`."""
    if not isinstance(digest, str):
        return
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.manifest import weights_digest

    with (
        Checkpoint(path) as checkpoint,
        byte_bar(f"comparing {path.name}", checkpoint.nbytes, quiet) as progress,
    ):
        same = weights_digest(checkpoint, progress) == digest
    if not same:
        kind = {"base": "base", "fine": "fine-tuned model"}[what]
        raise click.BadParameter(
            f"{q_file} was chosen for another {kind} than {path}: run find-q for this pair.", param_hint="--q"
        )
