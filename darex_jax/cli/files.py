"""Commands on files: check, prune, apply, inspect, verify, merge-adapter.

They do not load transformers, and all but merge-adapter not flax either; prune --q auto runs the model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.choose import OBJECTIVES
from darex_jax.cli.options import DATA_DIR, EXCLUDE, IGNORE, INCLUDE, JSON, PATH, RATE, SEED, TEXT
from darex_jax.cli.show import byte_bar, bytes_text, few, point_bar, print_table, q_text


@click.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@INCLUDE
@EXCLUDE
@JSON
def check(base: Path, fine: Path, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool) -> None:
    """Say what would be pruned, reading no weight.

    From names, shapes and configs alone: what is pruned, what is kept as fine-tuned, and every mismatch.
    """
    from darex_jax.core.scope import choose_scope
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.match import match_checkpoints

    with Checkpoint(base) as b, Checkpoint(fine) as f:
        match = match_checkpoints(b, f, choose_scope(_family(f, b), include, exclude))
        sizes = {name: tensor.info.size for name, tensor in f.tensors.items()}
        dtypes = sorted({str(f.tensors[name].info.dtype) for name in match.pruned})
    report = {
        "pruned": {"parameters": len(match.pruned), "entries": sum(sizes[n] for n in match.pruned)},
        "dense": {"parameters": len(match.dense), "entries": sum(sizes[n] for n in match.dense)},
        "dtypes": dtypes,
        "extra_rows": match.extra_rows,
        "base_only": match.base_only,
        "warnings": match.warnings,
        "faults": match.faults,
    }
    if as_json:
        click.echo(json.dumps(report | {"dense_names": match.dense}, indent=2))
    else:
        rows = [
            ("pruned", f"{len(match.pruned)} parameters, {sum(sizes[n] for n in match.pruned):,} entries"),
            ("kept as fine-tuned", few(match.dense)),
            ("only in the base", few(match.base_only)),
            ("extra rows", ", ".join(f"{n}: {k}" for n, k in match.extra_rows.items()) or "none"),
            ("dtype", ", ".join(dtypes)),
        ]
        print_table(f"{fine} against {base}", rows)
        for line in match.warnings:
            click.echo(f"warning: {line}")
    if match.faults:
        if not as_json:
            click.echo("These models do not fit together:", err=True)
            for line in match.faults:
                click.echo(f"  {line}", err=True)
        sys.exit(1)


@click.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@click.argument("out", type=PATH)
@RATE
@click.option("--q", "q", default=None, metavar="NUMBER|FILE|auto|OBJECTIVE",
              help="Divisor of the survivors, or find-q's file. Default: 1 - drop rate (DARE). auto: by the "
              "labels of --task, else by the model's predictions on --text, else DARE's; or an objective of "
              "find-q: closed-form, say, on --task, --text or generated examples.")  # fmt: skip
@click.option("--task", help="For --q auto or OBJECTIVE: where examples come from, as find-q takes it.")
@DATA_DIR
@TEXT
@SEED
@INCLUDE
@EXCLUDE
@IGNORE
@click.option(
    "--allow-nonfinite", is_flag=True, help="Carry NaN and infinity along instead of refusing them."
)
@JSON
def prune(
    base: Path,
    fine: Path,
    out: Path,
    drop_rate: float,
    q: str | None,
    task: str | None,
    data_dir: Path | None,
    text: Path | None,
    seed: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    ignore_config_fields: tuple[str, ...],
    allow_nonfinite: bool,
    as_json: bool,
) -> None:
    """Prune FINE - BASE and write the delta to OUT.

    BASE and FINE are Hugging Face directories; OUT is one safetensors file, replaced if it exists.
    """
    from darex_jax.core.scope import choose_scope
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.paths import check_output
    from darex_jax.files.prune import prune_checkpoints

    check_output(out)
    if q == "auto" or q in OBJECTIVES:
        divisor, why = _chosen_q(
            base,
            fine,
            drop_rate,
            q,
            task,
            data_dir,
            text,
            include,
            exclude,
            ignore_config_fields,
            seed,
            as_json,
        )
    elif task or data_dir or text:
        raise click.UsageError("--task, --data-dir and --text are for --q auto or an objective of find-q.")
    else:
        divisor, why = _read_q(q, drop_rate), None
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        family = _family(f, b)
        total = sum(t.info.nbytes for c in (b, f) for t in c.tensors.values())
        with byte_bar("pruning", total, as_json) as progress:
            summary = prune_checkpoints(
                b,
                f,
                out,
                key=(0, seed),
                drop_rate=drop_rate,
                q=divisor,
                scope=choose_scope(family, include, exclude),
                scope_text=_scope_text(family, include, exclude),
                allow_nonfinite=allow_nonfinite,
                progress=progress,
            )
        fine_bytes = sum(t.info.nbytes for t in f.tensors.values())
    report = {
        "out": str(out),
        "drop_rate": drop_rate,
        "seed": seed,
        "survivors": summary.survivors,
        "pruned_entries": summary.pruned_size,
        "bytes": summary.file_bytes,
        "fine_bytes": fine_bytes,
        "bytes_per_parameter": summary.file_bytes / max(1, summary.pruned_size),
        "inexact": summary.recipe.inexact,
        "nonfinite": summary.recipe.nonfinite,
    }
    if why is not None:
        report |= {"q": divisor, "q_chosen_by": why}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    density = summary.survivors / max(1, summary.pruned_size)
    rows = [
        ("survivors", f"{summary.survivors:,} of {summary.pruned_size:,} ({density:.4%})"),
        ("q", q_text({name: entry["q"] for name, entry in summary.recipe.parameters.items()})),
        *([("chosen by", why)] if why else []),
        ("size", f"{bytes_text(summary.file_bytes)}, {fine_bytes / summary.file_bytes:.1f} times smaller "
                 f"than the fine-tuned model ({bytes_text(fine_bytes)})"),
        ("bytes a parameter", f"{report['bytes_per_parameter']:.5f}"),
        ("inexact values", f"{summary.recipe.inexact:,} (rounded to the fine-tuned model's dtype)"),
    ]  # fmt: skip
    print_table(str(out), rows)


@click.command()
@click.argument("base", type=PATH)
@click.argument("delta", type=PATH)
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@JSON
def apply(base: Path, delta: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Restore a model: write BASE plus DELTA to OUT.

    OUT becomes a complete Hugging Face directory. Another base than the delta was made from is refused.
    """
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.restore import apply_artifact

    with Checkpoint(base) as b, DeltaFile(delta) as d:
        total = 2 * sum(t.info.nbytes for t in b.tensors.values())
        with byte_bar("applying", total, as_json) as progress:
            written = apply_artifact(b, d, out, overwrite=overwrite, progress=progress)
    if as_json:
        click.echo(json.dumps({"out": str(out), "bytes": written}))
    else:
        print_table(str(out), [("written", bytes_text(written)), ("base", f"{base}, fingerprint verified")])


@click.command()
@click.argument("delta", type=PATH)
@JSON
def inspect(delta: Path, as_json: bool) -> None:
    """What is in a delta and how it was made."""
    from darex_jax.files.artifact import KINDS, DeltaFile
    from darex_jax.files.safetensors import element_count

    with DeltaFile(delta) as d:
        recipe = d.recipe
        by_kind = {
            kind: sum(i.nbytes for n, i in d.tensors.items() if n.startswith(kind + "/")) for kind in KINDS
        }
        survivors = sum(d.tensors[f"values/{name}"].size for name in recipe.parameters)
        files, dense, extra = d.names("file"), d.names("dense"), d.names("rows")
    entries = sum(element_count(tuple(e["shape"])) for e in recipe.parameters.values())
    size = Path(delta).stat().st_size
    report = {
        "method": recipe.method,
        "drop_rate": recipe.drop_rate,
        "key": list(recipe.key),
        "scope": recipe.scope,
        "parameters": len(recipe.parameters),
        "entries": entries,
        "survivors": survivors,
        "q": sorted({e["q"] for e in recipe.parameters.values()}),
        "dense": dense,
        "extra_rows": extra,
        "files": files,
        "inexact": recipe.inexact,
        "nonfinite": recipe.nonfinite,
        "bytes": size,
        "bytes_by_kind": by_kind,
        "bytes_per_parameter": size / max(1, entries),
        "versions": recipe.versions,
        "data_blake3": recipe.data_blake3,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    values = {name: entry["q"] for name, entry in recipe.parameters.items()}
    rows = [
        ("method", f"{recipe.method}, drop rate {recipe.drop_rate}, q {q_text(values)}"),
        ("key", f"{recipe.key[0]}, {recipe.key[1]} (Threefry)"),
        ("scope", recipe.scope),
        ("pruned", f"{len(recipe.parameters)} parameters, {entries:,} entries"),
        ("survivors", f"{survivors:,} ({survivors / max(1, entries):.4%})"),
        ("kept dense", few(dense + extra)),
        ("files", ", ".join(files) or "none"),
        ("inexact values", f"{recipe.inexact:,}"),
        ("size", f"{bytes_text(size)}, {report['bytes_per_parameter']:.5f} bytes a parameter"),
        ("made with", ", ".join(f"{k} {v}" for k, v in recipe.versions.items())),
        ("content", recipe.data_blake3[:16] + "..."),
    ]
    print_table(str(delta), rows)


@click.command()
@click.argument("delta", type=PATH)
@click.option("--base", type=PATH, help="Also check that this is the base the delta was made from.")
@JSON
def verify(delta: Path, base: Path | None, as_json: bool) -> None:
    """Check a delta: digests, mask, base.

    The digest of the data, the number of survivors against the mask made anew from the key, and with --base
    every tensor of the base against its fingerprint.
    """
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.restore import verify_artifact

    with DeltaFile(delta) as d:
        if base is None:
            result = verify_artifact(d)
        else:
            with Checkpoint(base) as b:
                result = verify_artifact(d, b)
    if as_json:
        click.echo(json.dumps({"delta": str(delta)} | result))
    else:
        print_table(str(delta), list(result.items()))


@click.command("merge-adapter")
@click.argument("base", type=PATH)
@click.argument("adapter", type=PATH)
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@IGNORE
@JSON
def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    overwrite: bool,
    ignore_config_fields: tuple[str, ...],
    as_json: bool,
) -> None:
    """Merge a LoRA adapter: write BASE with ADAPTER in it to OUT.

    ADAPTER is a directory that PEFT saved. OUT becomes a complete Hugging Face directory, a fine-tune of BASE
    like any other for `darex prune`.
    """
    from darex_jax.files.merge import merge_adapter as merge

    summary = merge(base, adapter, out, overwrite=overwrite, ignore_config_fields=ignore_config_fields)
    if as_json:
        click.echo(json.dumps({"out": str(out), **summary._asdict()}))
        return
    rows = [
        ("merged", f"{summary.merged} weights"),
        ("taken whole", few(summary.replaced)),
        ("written", bytes_text(summary.bytes)),
    ]
    print_table(str(out), rows)


def _family(fine: Any, base: Any) -> str | None:
    return fine.config.get("model_type") or base.config.get("model_type")


def _scope_text(family: str | None, include: tuple[str, ...], exclude: tuple[str, ...]) -> str:
    parts = [f"include {pattern}" for pattern in include] or [f"default of {family}"]
    return ", ".join(parts + [f"exclude {pattern}" for pattern in exclude])


def _chosen_q(
    base: Path,
    fine: Path,
    drop_rate: float,
    objective: str,
    task: str | None,
    data_dir: Path | None,
    text: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    ignore_config_fields: tuple[str, ...],
    seed: int,
    quiet: bool,
) -> tuple[Any, str]:
    """A q from what is at hand, and how it was chosen."""
    if objective == "auto" and task is None and text is None:
        return None, "nothing: without --task or --text, q is DARE's 1 - drop rate"
    from darex_jax.runs.choose_q import choose_q

    with point_bar("choosing q", quiet) as on_value:
        found = choose_q(
            base,
            fine,
            drop_rate,
            objective=objective,
            scope="layer" if objective == "learned" else "model",
            task=task,
            data_dir=data_dir,
            text=text,
            include=include,
            exclude=exclude,
            ignore_config_fields=ignore_config_fields,
            seed=seed,
            on_value=on_value,
        )
    what = f"{found['value_name']} {found['value']:.4f}" if "value" in found else "solved"
    return found["q"], f"{found['objective']}: {what} on {found['examples']} examples"


def _read_q(text: str | None, drop_rate: float) -> float | dict[str, float] | None:
    """--q: a number, or a q file: {"q": number or {name: number}}, of `drop_rate` if it names one."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).exists():
        raise click.BadParameter(f"{text!r} is neither a number nor a file.", param_hint="--q")
    from darex_jax.files.checkpoint import read_json

    content = read_json(Path(text))
    q, chosen_for = content.get("q"), content.get("drop_rate", drop_rate)
    if chosen_for != drop_rate:
        raise click.BadParameter(
            f"{text} was chosen for a drop rate of {chosen_for}, not of {drop_rate}.", param_hint="--q"
        )
    if isinstance(q, int | float) or (isinstance(q, dict) and q):
        return q
    raise click.BadParameter(f"{text} has no 'q'.", param_hint="--q")
