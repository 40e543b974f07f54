"""Commands on files: check, apply, inspect, verify, merge-adapter, export.

They do not import transformers, nor, except for merge-adapter, flax.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.options import (
    ALLOW_CHANGED_FILES,
    EXCLUDE,
    IGNORE,
    INCLUDE,
    JSON,
    PARAMS,
    RENAME,
    renaming,
    warn_of_idle_patterns,
    with_params,
)
from darex_jax.cli.show import (
    byte_bar,
    bytes_text,
    family_of,
    few,
    found_scope,
    plain,
    print_table,
    q_text,
    warned,
)
from darex_jax.cli.stores import OUT, PATH, as_given
from darex_jax.core.errors import DarexError


@click.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@INCLUDE
@EXCLUDE
@RENAME
@PARAMS
@JSON
def check(
    base: Path,
    fine: Path,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: str | None,
    params: str | None,
    as_json: bool,
) -> None:
    """Show what would be pruned, without reading weights.

    From names, shapes and configs only: what is pruned, what is kept fine-tuned, and every mismatch.
    """
    from darex_jax.core.scope import choose_scope, known_family
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.match import match_checkpoints

    base, fine = with_params(params, base, fine)
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        scope = choose_scope(family_of(f, b), include, exclude, f.shapes)
        warn_of_idle_patterns(f.tensors, include, exclude, rename)
        match = match_checkpoints(b, f, scope, renaming(rename))
        found = not (include or known_family(family_of(f, b)))
        sizes = {name: tensor.info.size for name, tensor in f.tensors.items()}
        dtypes = sorted({str(f.tensors[name].info.dtype) for name in match.pruned})
    report = {
        "pruned": {"parameters": len(match.pruned), "entries": sum(sizes[n] for n in match.pruned)},
        "dense": {"parameters": len(match.dense), "entries": sum(sizes[n] for n in match.dense)},
        "found": found_scope(match.pruned) if found else None,
        "dtypes": dtypes,
        "extra_rows": match.extra_rows,
        "base_only": match.base_only,
        "warnings": [*match.warnings, *warned()],
        "faults": match.faults,
    }
    if as_json:
        click.echo(json.dumps(report | {"dense_names": match.dense}, indent=2))
    else:
        rows = [
            ("pruned", f"{len(match.pruned)} parameters, {sum(sizes[n] for n in match.pruned):,} entries"),
            *([("found", found_scope(match.pruned))] if found else []),
            ("kept as fine-tuned", few(match.dense)),
            ("only in the base", few(match.base_only)),
            ("extra rows", ", ".join(f"{n}: {k}" for n, k in match.extra_rows.items()) or "none"),
            ("dtype", ", ".join(dtypes)),
        ]
        print_table(f"{fine} against {base}", rows)
        for line in match.warnings:
            click.echo(f"warning: {plain(line)}")
    if match.faults:
        if not as_json:
            click.echo("These models do not match:", err=True)
            for line in match.faults:
                click.echo(f"  {plain(line)}", err=True)
        sys.exit(1)


@click.command()
@click.argument("base", type=PATH)
@click.argument("delta", type=PATH)
@click.argument("out", type=OUT)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Dtype of all floating parameters. Default: the fine-tuned model's.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@ALLOW_CHANGED_FILES
@click.option("--to", type=click.Choice(["safetensors", "orbax"]), help="Default: the format of BASE.")
@PARAMS
@JSON
def apply(
    base: Path,
    delta: Path,
    out: Path,
    dtype: str | None,
    overwrite: bool,
    allow_changed_files: bool,
    to: str | None,
    params: str | None,
    as_json: bool,
) -> None:
    """Restore a model: write BASE plus DELTA to OUT.

    OUT becomes a complete Hugging Face directory, or an orbax checkpoint. A base other than the delta's is
    refused, and so is one whose configuration or tokenizer files have changed.
    """
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.restore import apply_artifact

    with Checkpoint(*with_params(params, base)) as b, DeltaFile(delta) as d:
        total = 2 * b.nbytes
        with byte_bar("applying", total, as_json) as progress:
            written = apply_artifact(
                b,
                d,
                out,
                dtype=dtype,
                overwrite=overwrite,
                allow_changed_files=allow_changed_files,
                orbax=None if to is None else to == "orbax",
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps({"out": as_given(str(out)), "bytes": written, "warnings": warned()}))
    else:
        verified = "its tensors verified" if warned() else "fingerprint verified"
        rows = [("written", bytes_text(written)), ("base", f"{base}, {verified}")]
        print_table(str(out), rows)


@click.command()
@click.argument("delta", type=PATH)
@JSON
def inspect(delta: Path, as_json: bool) -> None:
    """Show what is in a delta, how large, and how it was made."""
    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.contents import contents

    with DeltaFile(delta) as d:
        report = contents(d)
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    q = {str(i): value for i, value in enumerate(report["q"])}
    how = [f"{name} {value}" for name, value in report["made_with"].items()]
    rows = [
        ("method", ", ".join([report["method"], *how, f"q {q_text(q)}"] if q else [report["method"], *how])),
        ("key", f"{report['key'][0]}, {report['key'][1]} (Threefry)"),
        ("scope", report["scope"]),
        ("pruned", f"{report['parameters']} parameters, {report['entries']:,} entries"),
        ("restored in", ", ".join(report["dtypes"]) or "the base's dtype"),
        (
            "stored numbers",
            f"{report['survivors']:,} ({report['survivors'] / max(1, report['entries']):.4%})",
        ),
        ("kept whole", few(report["dense"] + report["extra_rows"])),
        ("files", ", ".join(report["files"]) or "none"),
        *([] if report["inexact"] is None else [("inexact values", f"{report['inexact']:,}")]),
        ("size", f"{bytes_text(report['bytes'])}, {report['bytes_per_parameter']:.5f} bytes per parameter"),
        *((f"  {name}", bytes_text(count)) for name, count in report["bytes_by_kind"].items()),
        ("made with", ", ".join(f"{k} {v}" for k, v in report["versions"].items())),
        ("digest", report["digest"]),
    ]
    print_table(str(delta), rows)


@click.command()
@click.argument("delta", type=PATH)
@click.option("--base", type=PATH, help="Also check that this is the delta's base.")
@click.option("--max-entries", type=click.IntRange(0),
              help="Maximum entries of all masks, without --base; files with more are refused. Default: "
              "2**36, and at most 8192 for each byte of the file.")  # fmt: skip
@ALLOW_CHANGED_FILES
@PARAMS
@JSON
def verify(
    delta: Path,
    base: Path | None,
    max_entries: int | None,
    allow_changed_files: bool,
    params: str | None,
    as_json: bool,
) -> None:
    """Check a delta: digests, mask, base.

    Checks the digest of the data, the number of survivors against the recomputed mask, and with --base the
    fingerprints of all tensors of the base and of the files that the restored model inherits from it.
    """
    from contextlib import ExitStack

    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.restore import verify_artifact

    with ExitStack() as stack:
        d = stack.enter_context(DeltaFile(delta))
        b = None if base is None else stack.enter_context(Checkpoint(*with_params(params, base)))
        total = 4 * d.entries + (0 if b is None else b.nbytes)
        progress = stack.enter_context(byte_bar("verifying", total, as_json))
        result = verify_artifact(
            d, b, progress, allow_changed_files=allow_changed_files, max_entries=max_entries
        )
    if as_json:
        click.echo(json.dumps({"delta": as_given(str(delta)), **result, "warnings": warned()}))
    else:
        print_table(str(delta), list(result.items()))


@click.command("merge-adapter")
@click.argument("base", type=PATH)
@click.argument("adapter", type=PATH)
@click.argument("out", type=OUT)
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
    """Merge a LoRA adapter into BASE, written to OUT.

    ADAPTER is a directory that PEFT saved. OUT becomes a complete Hugging Face directory, an ordinary
    fine-tuned model for `darex prune`.
    """
    from darex_jax.files.merge import merge_adapter as merge

    summary = merge(base, adapter, out, overwrite=overwrite, ignore_config_fields=ignore_config_fields)
    if as_json:
        click.echo(json.dumps({"out": as_given(str(out)), **summary._asdict()}))
        return
    rows = [
        ("merged", f"{summary.merged} weights"),
        ("replaced", few(summary.replaced)),
        ("written", bytes_text(summary.bytes)),
    ]
    print_table(str(out), rows)


@click.command()
@click.argument("delta", type=PATH)
@click.argument("out", type=OUT)
@click.option("--to", "form", required=True, type=click.Choice(["peft", "patch"]),
              help="A directory for PEFT, or a file with the changed values.")  # fmt: skip
@click.option("--base", type=PATH, help="The delta's base.")
@click.option("--rank", type=click.IntRange(1),
              help="For peft: reduce every matrix to at most this rank.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@JSON
def export(
    delta: Path, out: Path, form: str, base: Path | None, rank: int | None, overwrite: bool, as_json: bool
) -> None:
    """Export a delta for other tools.

    peft: OUT is an adapter directory for PEFT and compatible tools. patch: OUT is a file with flat indices
    and the fine-tuned values there, for each changed parameter of BASE.
    """
    from contextlib import ExitStack

    from darex_jax.files.artifact import DeltaFile
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.export import export_adapter, export_patch

    if form == "patch" and (base is None or rank is not None):
        raise click.UsageError("a patch needs --base" + (" and no --rank." if rank is not None else "."))
    if out.exists() and not overwrite:
        raise DarexError(f"{out} already exists; pass --overwrite to replace it.")
    with ExitStack() as stack:
        file = stack.enter_context(DeltaFile(delta))
        checkpoint = None if base is None else stack.enter_context(Checkpoint(base))
        if form == "patch":
            assert checkpoint is not None
            changed = export_patch(checkpoint, file, out)
            entries, of = (sum(row[k] for row in changed.values()) for k in ("changed", "entries"))
            report: dict[str, Any] = {"parameters": len(changed), "changed": entries, "of": of}
            rows = [("changed", f"{entries:,} of {of:,} values in {len(changed)} parameters")]
        else:
            found = export_adapter(file, out, base=checkpoint, rank=rank, overwrite=overwrite)
            low, high = min(found.ranks.values()), max(found.ranks.values())
            report = found._asdict()
            rows = [
                ("adapted", f"{len(found.ranks)} layers of rank {low} to {high}"),
                ("stored whole", f"{len(found.whole)} norms, biases and heads"),
                ("left out", f"{found.lost:.2%} of the delta's squared norm"),
            ]
    size = sum(f.stat().st_size for f in (out.iterdir() if out.is_dir() else [out]))
    if as_json:
        click.echo(json.dumps({"out": as_given(str(out)), "bytes": size, **report, "warnings": warned()}))
    else:
        print_table(str(out), [*rows, ("written", bytes_text(size))])
