"""`darex merge`: merges several deltas of one base into a model."""

import json
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    JSON,
    SEED,
)
from darex_jax.cli.show import byte_bar, bytes_text, print_table, warned
from darex_jax.cli.stores import OUT, PATH, as_given
from darex_jax.merging.table import MERGES


@click.command()
@click.argument("base", type=PATH)
@click.argument("deltas", nargs=-1, required=True, type=PATH)
@click.argument("out", type=OUT)
@click.option("--method", default="dare-ties", show_default=True, type=click.Choice(list(MERGES)),
              help="; ".join(f"{name}: {way.what}" for name, way in MERGES.items()) + ".")  # fmt: skip
@click.option("--weight", "weights", multiple=True, type=float,
              help="Weight of a delta: one for all, or one per delta in order. Default: 1.")  # fmt: skip
@click.option("--drop-rate", "-p", type=click.FloatRange(0, 1, max_open=True),
              help="Share of each delta that is dropped; 1 - the density of other tools. For all but "
              "task-arithmetic.")  # fmt: skip
@click.option("--q", "qs", multiple=True, type=click.FloatRange(0, min_open=True),
              help="Divisor of random survivors (DAREx), one for all or one each. Default: 1 - drop rate."
              )  # fmt: skip
@click.option("--outliers", type=click.FloatRange(0, 1), help="For breadcrumbs: share of the largest "
              "entries to drop. Default: 0.01.")  # fmt: skip
@click.option("--window", type=click.FloatRange(0, 1), help="For della: difference of the drop rates of "
              "a row's smallest and largest entry. Default: 0.2, or the largest possible.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Dtype of the result. Default: the widest of the fine-tuned models'.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists and is a single model.")
@ALLOW_CHANGED_FILES
@SEED
@JSON
def merge(
    base: Path,
    deltas: tuple[Path, ...],
    out: Path,
    method: str,
    weights: tuple[float, ...],
    drop_rate: float | None,
    qs: tuple[float, ...],
    outliers: float | None,
    window: float | None,
    dtype: str | None,
    overwrite: bool,
    allow_changed_files: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Merge DELTAS of one BASE into a model, written to OUT.

    Each of DELTAS is an artifact of darex prune, a fine-tuned directory, or an adapter that PEFT saved. If
    their heads differ, OUT has one directory per delta, which share the merged body.
    """
    from darex_jax.core.tree import seed_key
    from darex_jax.files.merged import merge_files

    for name, values in (("weight", weights), ("q", qs)):
        if len(values) not in (0, 1, len(deltas)):
            raise click.UsageError(
                f"{len(deltas)} deltas need 1 --{name} or {len(deltas)}, got {len(values)}."
            )
    if "drop_rate" in MERGES[method].takes and drop_rate is None:
        raise click.UsageError(f"{method} needs --drop-rate.")
    with byte_bar("merging", _size(base), as_json) as progress:
        merged = merge_files(
            base, deltas, out, method,
            weights=list(weights) * len(deltas) if len(weights) == 1 else list(weights) or None,
            drop_rate=drop_rate, q=qs[0] if len(qs) == 1 else list(qs) or None, outliers=outliers,
            window=window, key=seed_key(seed) if "key" in MERGES[method].takes else None,
            dtype=dtype, overwrite=overwrite, allow_changed_files=allow_changed_files, progress=progress,
        )  # fmt: skip
    if as_json:
        out_places = [as_given(str(place)) for place in merged.directories]
        report: dict[str, Any] = {"out": out_places, "method": method}
        report |= {"changed": merged.changed, "bytes": merged.bytes, "warnings": warned()}
        click.echo(json.dumps(report))
        return
    rows = [
        ("method", f"{method}: {MERGES[method].what}"),
        ("merged", f"{len(deltas)} deltas in {merged.changed} parameters"),
        ("written", bytes_text(merged.bytes)),
        *(("model", str(place)) for place in merged.directories),
    ]
    print_table(str(out), rows)


def _size(base: Path) -> int:
    from darex_jax.files.checkpoint import Checkpoint

    with Checkpoint(base) as checkpoint:
        return checkpoint.nbytes
