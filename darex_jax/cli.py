"""The `darex` command. Each command parses, calls one library function and prints a short summary.

Imports stay inside the commands: `darex --help` must not wait for jax, and the commands on files need
neither transformers nor flax.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1),
                    help="Everything random follows from jax.random.key(SEED).")  # fmt: skip
RATE = click.option("--drop-rate", "-p", required=True, type=click.FloatRange(0, 1, max_open=True),
                    help="Probability that an entry of the delta is dropped.")  # fmt: skip
INCLUDE = click.option("--include", multiple=True, metavar="REGEX", help="Prune only what matches.")
EXCLUDE = click.option("--exclude", multiple=True, metavar="REGEX", help="Do not prune what matches.")


class FriendlyGroup(click.Group):
    """A user's mistake ends in one line on stderr and exit code 1; Ctrl-C in 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError) as error:
            raise click.ClickException(_one_message(error)) from error


def _one_message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


@click.group(cls=FriendlyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="darex_jax")
def main() -> None:
    """Prune the delta of a fine-tuned model: drop 90-99.9 % of it, rescale what is left, keep the ability."""


@main.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@INCLUDE
@EXCLUDE
@JSON
def check(base: Path, fine: Path, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool) -> None:
    """What would be pruned and what not, from names, shapes and configs alone. Reads no weight."""
    from darex_jax.checkpoint import Checkpoint
    from darex_jax.match import match_checkpoints
    from darex_jax.scope import choose_scope

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
            ("kept as fine-tuned", _few(match.dense)),
            ("only in the base", _few(match.base_only)),
            ("extra rows", ", ".join(f"{n}: {k}" for n, k in match.extra_rows.items()) or "none"),
            ("dtype", ", ".join(dtypes)),
        ]
        _print_table(f"{fine} against {base}", rows)
        for line in match.warnings:
            click.echo(f"warning: {line}")
    if match.faults:
        if not as_json:
            click.echo("These models do not fit together:", err=True)
            for line in match.faults:
                click.echo(f"  {line}", err=True)
        sys.exit(1)


@main.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@click.argument("out", type=PATH)
@RATE
@click.option("--q", "q", default=None, metavar="NUMBER|FILE",
              help="Divisor of the survivors, or find-q's file. Default: 1 - drop rate (DARE).")  # fmt: skip
@SEED
@INCLUDE
@EXCLUDE
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
    seed: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    allow_nonfinite: bool,
    as_json: bool,
) -> None:
    """Prune FINE - BASE and write the delta to OUT, one safetensors file."""
    from darex_jax.checkpoint import Checkpoint
    from darex_jax.scope import choose_scope
    from darex_jax.stream import prune_checkpoints

    with Checkpoint(base) as b, Checkpoint(fine) as f:
        family = _family(f, b)
        total = sum(t.info.nbytes for c in (b, f) for t in c.tensors.values())
        with _progress("pruning", total, as_json) as progress:
            summary = prune_checkpoints(
                b,
                f,
                out,
                key=(0, seed),
                drop_rate=drop_rate,
                q=_read_q(q),
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
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    density = summary.survivors / max(1, summary.pruned_size)
    rows = [
        ("survivors", f"{summary.survivors:,} of {summary.pruned_size:,} ({density:.4%})"),
        ("q", _q_text(summary.recipe.parameters)),
        ("size", f"{_size(summary.file_bytes)}, {fine_bytes / summary.file_bytes:.1f} times smaller than "
                 f"the fine-tuned model ({_size(fine_bytes)})"),
        ("bytes a parameter", f"{report['bytes_per_parameter']:.5f}"),
        ("inexact values", f"{summary.recipe.inexact:,} (rounded to the fine-tuned model's dtype)"),
    ]  # fmt: skip
    _print_table(str(out), rows)


@main.command()
@click.argument("base", type=PATH)
@click.argument("delta", type=PATH)
@click.argument("out", type=PATH)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@JSON
def apply(base: Path, delta: Path, out: Path, overwrite: bool, as_json: bool) -> None:
    """Restore a model: BASE plus DELTA, written to OUT as a complete Hugging Face directory."""
    from darex_jax.artifact import DeltaFile
    from darex_jax.checkpoint import Checkpoint
    from darex_jax.stream import apply_artifact

    with Checkpoint(base) as b, DeltaFile(delta) as d:
        total = 2 * sum(t.info.nbytes for t in b.tensors.values())
        with _progress("applying", total, as_json) as progress:
            written = apply_artifact(b, d, out, overwrite=overwrite, progress=progress)
    if as_json:
        click.echo(json.dumps({"out": str(out), "bytes": written}))
    else:
        _print_table(str(out), [("written", _size(written)), ("base", f"{base}, fingerprint verified")])


@main.command()
@click.argument("delta", type=PATH)
@JSON
def inspect(delta: Path, as_json: bool) -> None:
    """What is in a delta and how it was made."""
    from darex_jax.artifact import KINDS, DeltaFile
    from darex_jax.safetensors_io import element_count

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
    rows = [
        ("method", f"{recipe.method}, drop rate {recipe.drop_rate}, q {_q_text(recipe.parameters)}"),
        ("key", f"{recipe.key[0]}, {recipe.key[1]} (Threefry)"),
        ("scope", recipe.scope),
        ("pruned", f"{len(recipe.parameters)} parameters, {entries:,} entries"),
        ("survivors", f"{survivors:,} ({survivors / max(1, entries):.4%})"),
        ("kept dense", _few(dense + extra)),
        ("files", ", ".join(files) or "none"),
        ("inexact values", f"{recipe.inexact:,}"),
        ("size", f"{_size(size)}, {report['bytes_per_parameter']:.5f} bytes a parameter"),
        ("made with", ", ".join(f"{k} {v}" for k, v in recipe.versions.items())),
        ("content", recipe.data_blake3[:16] + "..."),
    ]
    _print_table(str(delta), rows)


@main.command()
@click.argument("delta", type=PATH)
@click.option("--base", type=PATH, help="Also check that this is the base the delta was made from.")
@JSON
def verify(delta: Path, base: Path | None, as_json: bool) -> None:
    """Check a delta's digests, its mask against its key, and its base's fingerprint."""
    from darex_jax.artifact import DeltaFile
    from darex_jax.checkpoint import Checkpoint
    from darex_jax.stream import verify_artifact

    with DeltaFile(delta) as d:
        if base is None:
            result = verify_artifact(d)
        else:
            with Checkpoint(base) as b:
                result = verify_artifact(d, b)
    if as_json:
        click.echo(json.dumps({"delta": str(delta)} | result))
    else:
        _print_table(str(delta), list(result.items()))


TASK = click.option("--task", "task_name", default="opinions", show_default=True,
                    help="opinions (generated), cola, sst2, mrpc or stsb.")  # fmt: skip
DATA_DIR = click.option("--data-dir", type=PATH, help="Folder with the task's parquet files; else the hub.")
LIMIT = click.option("--limit", type=click.IntRange(1), help="Use at most so many examples of the split.")
LEARNING_RATE = click.option("--learning-rate", default=3e-4, show_default=True, type=float)
BATCH_SIZE = click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))


@main.command()
@click.argument("base", type=PATH)
@click.argument("out", type=PATH)
@TASK
@DATA_DIR
@LEARNING_RATE
@BATCH_SIZE
@click.option("--steps", type=click.IntRange(1), help="How long; or give --epochs.")
@click.option("--epochs", type=float, help="How long; or give --steps. Default: 3 epochs.")
@click.option("--limit", type=click.IntRange(1), help="Train on the first so many examples.")
@SEED
@JSON
def train(
    base: Path,
    out: Path,
    task_name: str,
    data_dir: Path | None,
    learning_rate: float,
    batch_size: int,
    steps: int | None,
    epochs: float | None,
    limit: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune BASE on a task with AdamW and write a Hugging Face directory to OUT."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: already exists; choose another place.")
    import jax

    from darex_jax.batching import encode, load_tokenizer
    from darex_jax.checkpoint import save_params
    from darex_jax.evaluate import evaluate
    from darex_jax.models import classifier_from_pretrained, load_model
    from darex_jax.tasks import load_task
    from darex_jax.train import fine_tune

    task = load_task(task_name, data_dir, seed)
    tokenizer = load_tokenizer(base)
    examples = encode(tokenizer, task.train.select(slice(limit)))
    if steps is None and epochs is None:
        epochs = 3.0
    key = jax.random.key(seed)
    model, params = load_model(base)
    problem = "regression" if task.kind == "regression" else "single_label_classification"
    model, params = classifier_from_pretrained(
        model, params, task.num_labels, jax.random.fold_in(key, 0), problem
    )
    total = steps or round((epochs or 0) * -(-len(examples) // batch_size))
    with _steps("fine-tuning", total, as_json) as on_step:
        params, history = fine_tune(
            model,
            params,
            examples,
            key=jax.random.fold_in(key, 1),
            learning_rate=learning_rate,
            batch_size=batch_size,
            steps=total,
            on_step=on_step,
        )
    save_params(out, params, model.config.to_hf(), companions_from=base)
    result = evaluate(model, params, encode(tokenizer, task.test), task)
    report = {"out": str(out), "task": task.name, "steps": total, "loss": history[-1].loss} | result
    if as_json:
        click.echo(json.dumps(report))
    else:
        rows = [
            ("trained", f"{total} steps of {batch_size}, last loss {history[-1].loss:.4f}"),
            (f"test {task.metric_name}", f"{result['metric']:.4f} on {result['n']} examples"),
        ]
        _print_table(str(out), rows)


@main.command("eval")
@click.argument("model", type=PATH)
@TASK
@DATA_DIR
@click.option("--split", default="test", show_default=True, type=click.Choice(["validation", "test"]))
@LIMIT
@SEED
@JSON
def evaluate_command(
    model: Path,
    task_name: str,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """The metric of a fine-tuned MODEL on a task."""
    from darex_jax.batching import encode, load_tokenizer
    from darex_jax.evaluate import evaluate
    from darex_jax.models import load_model
    from darex_jax.tasks import load_task

    loaded, params = load_model(model)
    task = load_task(task_name, data_dir, seed)
    examples = encode(load_tokenizer(model), getattr(task, split).select(slice(limit)))
    result = {"model": str(model), "task": task.name, "split": split}
    result |= evaluate(loaded, params, examples, task)
    if as_json:
        click.echo(json.dumps(result))
    else:
        text = f"{result['metric']:.4f} on {result['n']} examples"
        _print_table(str(model), [(f"{task.name} {split} {task.metric_name}", text)])


@main.command("find-q")
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@RATE
@click.option("--objective", default="labels", show_default=True, type=click.Choice(["labels", "outputs"]),
              help="labels: the validation metric (q_v); outputs: the output change (q_e).")  # fmt: skip
@TASK
@DATA_DIR
@click.option("--out", type=PATH, default="q.json", show_default=True, help="File for darex prune --q.")
@LIMIT
@INCLUDE
@EXCLUDE
@SEED
@JSON
def find_q_command(
    base: Path,
    fine: Path,
    drop_rate: float,
    objective: Any,
    task_name: str,
    data_dir: Path | None,
    out: Path,
    limit: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Search the one q by which the survivors are divided (Algorithm 2) and write it to a file."""
    from darex_jax.batching import encode, load_tokenizer
    from darex_jax.checkpoint import read_config
    from darex_jax.find_q import MASK_SEEDS, find_q, load_pair, masked_deltas, split_in_scope
    from darex_jax.scope import choose_scope
    from darex_jax.tasks import load_task

    scope = choose_scope(read_config(fine).get("model_type"), include, exclude)
    model, params, base_params = load_pair(base, fine, scope)
    start, delta = split_in_scope(params, base_params)
    task = load_task(task_name, data_dir)
    split = task.validation if objective == "labels" else task.train
    examples = encode(load_tokenizer(fine), split.select(slice(limit)))
    seeds = (seed,) if objective == "labels" else tuple(seed + s for s in MASK_SEEDS)
    masked = masked_deltas(delta, drop_rate, seeds)

    def on_value(q: float, value: float) -> None:
        if not as_json:
            click.echo(f"  q {q:<10.6g} {value:.5f}", err=True)

    found = find_q(
        model,
        params,
        start,
        masked,
        drop_rate,
        objective=objective,
        task=task,
        examples=examples,
        on_value=on_value,
    )
    report = {
        "q": found.q,
        "value": found.value,
        "objective": objective,
        "drop_rate": drop_rate,
        "task": task.name,
        "mask_seeds": list(seeds),
        "plateau": list(found.plateau),
        "curve": [list(point) for point in found.curve],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(report))
    else:
        what = f"validation {task.metric_name}" if objective == "labels" else "output change"
        dare = next(value for q, value in found.curve if q == found.curve[0][0])
        rows = [
            ("q", f"{found.q:.6g} (DARE: {found.curve[0][0]:.6g})"),
            (what, f"{found.value:.4f} (DARE: {dare:.4f})"),
            ("use it", f"darex prune BASE FINE OUT --drop-rate {drop_rate} --q {out} --seed {seed}"),
        ]
        _print_table(str(out), rows)


@main.command()
@click.option("--base", type=PATH, help="Directory of a pretrained BERT. Default: MiniLM from its package.")
@click.option("--out", type=PATH, default="runs/demo", show_default=True)
@TASK
@DATA_DIR
@click.option("--steps", default=250, show_default=True, type=click.IntRange(1))
@LEARNING_RATE
@BATCH_SIZE
@LIMIT
@SEED
@JSON
def demo(
    base: Path | None,
    out: Path,
    task_name: str,
    data_dir: Path | None,
    steps: int,
    learning_rate: float,
    batch_size: int,
    limit: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune a real encoder, prune its delta at 0.9, 0.99 and 0.999, store, restore, evaluate."""
    from darex_jax.demo import demo_weights, run_demo

    base = base or demo_weights()
    with _steps("fine-tuning", steps, as_json) as on_step:
        results = run_demo(
            base,
            out,
            task_name=task_name,
            data_dir=data_dir,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            limit=limit or 1000,
            say=lambda line: None if as_json else click.echo(line, err=True),
            on_step=on_step,
        )
    if as_json:
        click.echo(json.dumps(results))
        return
    _print_demo(results)
    click.echo(f"Picture: {out / 'metric_by_q.png'}; numbers: {out / 'results.json'}")


def _print_demo(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{results['task']}, test {results['metric']}: fine-tuned {results['fine_tuned']:.3f}"
    table = Table(title=title, caption="mean ± standard deviation over 4 masks; size of the q_v artifact")
    for heading in ("drop rate", "DARE", "q by labels", "q by outputs", "size", "restored"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["rates"]:
        cells = [f"{row[m]['mean']:.3f} ±{row[m]['std']:.3f}" for m in ("dare", "q_v", "q_e")]
        for i, method in ((1, "q_v"), (2, "q_e")):
            cells[i] += f"\nq {row[method]['q']:.4g}"
        ratio = results["fine_bytes"] / row["artifact_bytes"]
        bits = "same bits" if row["restored_bit_identical"] else "DIFFERS"
        table.add_row(str(row["drop_rate"]), *cells, f"{_size(row['artifact_bytes'])}\n1/{ratio:.0f}", bits)
    Console().print(table)


@contextmanager
def _steps(title: str, total: int, quiet: bool) -> Iterator[Callable[[Any], None]]:
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit="step", disable=quiet, mininterval=1.0) as bar:

        def on_step(record: Any) -> None:
            bar.set_postfix(loss=f"{record.loss:.3f}", refresh=False)
            bar.update(1)
            if bar.n >= total:  # what comes next prints below a finished bar
                bar.close()

        yield on_step


def _family(fine: Any, base: Any) -> str | None:
    return fine.config.get("model_type") or base.config.get("model_type")


def _scope_text(family: str | None, include: tuple[str, ...], exclude: tuple[str, ...]) -> str:
    parts = [f"include {pattern}" for pattern in include] or [f"default of {family}"]
    return ", ".join(parts + [f"exclude {pattern}" for pattern in exclude])


def _read_q(text: str | None) -> float | dict[str, float] | None:
    """--q: a number, or a q file: {"q": number or {name: number}}."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).is_file():
        raise click.BadParameter(f"{text!r} is neither a number nor a file.", param_hint="--q")
    from darex_jax.checkpoint import read_json

    q = read_json(Path(text)).get("q")
    if isinstance(q, int | float) or (isinstance(q, dict) and q):
        return q
    raise click.BadParameter(f"{text} has no 'q'.", param_hint="--q")


def _q_text(parameters: dict[str, dict[str, Any]]) -> str:
    values = sorted({entry["q"] for entry in parameters.values()})
    return f"{values[0]:.6g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}, one a parameter"


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _print_table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, str(value))
    Console().print(table)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for work over two seconds. The callback counts bytes; threads may call it."""
    from tqdm import tqdm

    with tqdm(
        desc=title,
        total=total,
        unit="B",
        unit_scale=True,
        delay=2,
        disable=True if quiet else None,
        leave=False,
    ) as bar:
        yield bar.update
