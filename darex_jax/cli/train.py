"""`darex train` and `darex repeat`: fine-tuning, and repeating a run."""

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import click

from darex_jax.cli.options import (
    BATCH_SIZE,
    DATA_DIR,
    DIFFICULTY,
    IGNORE,
    JSON,
    LEARNING_RATE,
    SEED,
    TEXT_COLUMN,
    check_data_dir,
    check_difficulty,
    own_examples,
    take_only_table,
    typed,
)
from darex_jax.cli.show import print_table, training_bar
from darex_jax.cli.stores import HERE, PATH


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Makes options from a TOML file the defaults; the command line takes precedence."""
    if path is None:
        return
    from darex_jax.files.paths import read_text

    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path} is not TOML: {error}.") from error
    names = {param.name for param in ctx.command.params} - {"config", "as_json"}
    if unknown := sorted(content.keys() - names):
        possible = ", ".join(sorted(map(str, names)))
        raise click.BadParameter(f"{path} has unknown {', '.join(unknown)}; the options are {possible}.")
    single = {param.name for param in ctx.command.params if not getattr(param, "multiple", False)}
    if wrong := [
        name for name, value in content.items() if name in single and isinstance(value, list | dict)
    ]:
        raise click.BadParameter(f"{path}: {wrong[0]} is a single value, got {content[wrong[0]]!r}.")
    ctx.default_map = {**(ctx.default_map or {}), **content}


CONFIG = click.option("--config", type=PATH, is_eager=True, expose_value=False, callback=_read_config,
                      help="TOML file of options, such as `learning_rate = 1e-4`; the command "
                      "line takes precedence. Every run writes one to OUT.run/train.toml.")  # fmt: skip


@click.command()
@click.argument("base", type=HERE)
@click.argument("out", type=HERE)
@CONFIG
@click.option("--task", default="opinions", show_default=True,
              help="opinions, cola, sst2, mrpc, stsb; for decoders gsm8k, word-problems.")  # fmt: skip
@DATA_DIR
@own_examples
@TEXT_COLUMN
@DIFFICULTY
@click.option("--limit", type=click.IntRange(1), help="Number of training examples to use, the first ones.")
@click.option("--steps", type=click.IntRange(1), help="Length; or pass --epochs.")
@click.option("--epochs", type=float, help="Length; or pass --steps. Default: 3 epochs.")
@BATCH_SIZE
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(1),
              help="Micro-batches per batch, to save memory.")  # fmt: skip
@LEARNING_RATE
@click.option("--warmup-ratio", default=0.1, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "adamr"]),
              help="adamr pulls towards the pretrained weights: deltas tolerate more pruning.")  # fmt: skip
@click.option("--norm", default="l2", show_default=True, type=click.Choice(["l2", "l1"]),
              help="Norm of adamr's pull.")  # fmt: skip
@click.option("--weight-decay", default=0.01, show_default=True, type=click.FloatRange(0),
              help="adamw: towards zero; adamr: towards the base (adapters: zero).")  # fmt: skip
@click.option("--clip-norm", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]),
              help="Compute dtype; weights and optimizer are float32.")  # fmt: skip
@click.option(
    "--dropout/--no-dropout",
    default=True,
    show_default=True,
    help="Use config.json's dropout, or none.",
)
@click.option("--remat", is_flag=True,
              help="Recompute layers in the backward pass: less memory, a third more time.")  # fmt: skip
@click.option(
    "--lora-rank", type=click.IntRange(1), help="Train adapters of this rank; OUT is in PEFT's format."
)
@click.option("--lora-alpha", type=float, help="Their scale is alpha / rank. Default: twice the rank.")
@click.option("--lora-targets", multiple=True, metavar="NAME", default=("query", "value", "q_proj", "v_proj"),
              show_default=True, help="Layers with adapters, by the ends of their names.")  # fmt: skip
@click.option("--rslora", is_flag=True, help="The scale is alpha / sqrt(rank).")
@click.option("--validation-limit", default=500, show_default=True, type=click.IntRange(1),
              help="Held-out examples evaluated at every checkpoint.")  # fmt: skip
@click.option(
    "--checkpoint-every", type=click.IntRange(1), metavar="STEPS", help="Default: a tenth of the run."
)
@click.option("--keep", default=2, show_default=True, type=click.IntRange(1),
              help="Number of newest checkpoints to keep, beside the best.")  # fmt: skip
@click.option("--best", is_flag=True, help="Write the best checkpoint by validation, not the last step.")
@click.option("--mesh", metavar="DATAxMODEL", help="Numbers of shards of batch and weights.")
@IGNORE
@SEED
@JSON
def train(base: Path, out: Path, task: str, as_json: bool, **options: Any) -> None:
    """Fine-tune BASE on a task and write the model to OUT.

    Linear warm-up and decay. OUT is a Hugging Face directory (with --lora-rank, an adapter) with a manifest
    of the run; metrics, curves and checkpoints are in OUT.run. After an interruption the same command resumes
    from the last checkpoint, and gives the same bits.
    """
    from darex_jax.core.memory import keep_freed_memory
    from darex_jax.runs.train import train_run
    from darex_jax.training.loop import Recipe

    check_difficulty(task)
    check_data_dir(task if options["data"] is None else None, options["data_dir"])
    if typed("steps") != typed("epochs"):  # it takes precedence over the other one in a config
        options["epochs" if typed("steps") else "steps"] = None
    elif options["steps"] is None and options["epochs"] is None:
        options["epochs"] = 3.0
    given = set(filter(typed, options))
    if "norm" in given and options["optimizer"] != "adamr":
        raise click.UsageError("--norm is of --optimizer adamr.")
    if options["lora_rank"] is None and (stray := given & {"lora_alpha", "lora_targets", "rslora"}):
        raise click.UsageError(f"--{min(stray).replace('_', '-')} needs --lora-rank.")
    recipe = Recipe(**{field.name: options.pop(field.name) for field in dataclasses.fields(Recipe)})
    table = take_only_table(options, "task")
    keep_freed_memory()
    with training_bar("fine-tuning", as_json) as on_step:
        report = train_run(
            base, out, recipe, task=task, table=table, **options,
            say=lambda line: click.echo(line, err=True), on_step=on_step,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_table(str(out), _train_rows(report))


def _train_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("trained", f"{report['steps']} steps, last loss {report['loss']:.4f}"),
        ("delta", f"root mean square {report['delta_rms']:.3g}, largest {report['delta_max']:.3g}"),
        (f"validation: {report['metric_name']}", f"{report['validation']:.4f}"),
    ]
    if report["step_taken"] != report["steps"]:
        rows.append(("written", f"the best checkpoint, of step {report['step_taken']}"))
    if "test" in report:
        tested = f"{report['test']:.4f} on {report['test_examples']} examples"
        rows.append((f"test: {report['metric_name']}", tested))
    else:
        rows.append(("validation loss", f"{report['validation_loss']:.4f}"))
        rows.append(("answers all correct", f"{report['validation_answers']:.4f}"))
    return [*rows, ("digest", report["digest"][:16] + "..."), ("metrics, curves", report["run"])]


@click.command()
@click.argument("manifest", type=PATH)
@click.option("--base", type=PATH, help="The base's current path, if it was moved.")
@click.option("--data-dir", type=PATH, help="The data's current path, if it was moved.")
@click.option("--out", type=HERE, help="Keep the result of the repeat there. Default: it is deleted.")
@JSON
def repeat(manifest: Path, base: Path | None, data_dir: Path | None, out: Path | None, as_json: bool) -> None:
    """Repeat a training and compare the digests.

    MANIFEST is a darex_manifest.json, or its directory. Reports whether the repeat has the same bits, and if
    not, what differs: base, data, versions, platform. Exit code 1 if it differs.
    """
    from darex_jax.core.memory import keep_freed_memory
    from darex_jax.runs.repeat import repeat_run

    keep_freed_memory()
    with training_bar("repeating", as_json) as on_step:
        report = repeat_run(
            manifest, base=base, data_dir=data_dir, out=out,
            say=lambda line: click.echo(line, err=True), on_step=on_step,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report))
    else:
        rows = [(name, f"{digest[:16]}..., {'the same' if same else 'DIFFERENT'}")
                for name, (digest, same) in report["outputs"].items()]  # fmt: skip
        rows += [(f"{d['what']} differs", f"{d['then']} then, {d['now']} now") for d in report["differences"]]
        print_table("the same bits" if report["same"] else "NOT the same bits", rows)
    sys.exit(0 if report["same"] else 1)
