"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from darex_jax.cli.stores import HERE, PATH


class Ratio(click.ParamType):  # type: ignore[type-arg]  # older ones take no argument
    """`100x`: a hundredth of the fine-tuned model."""

    name = "RATIOx"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            ratio = float(str(value).removesuffix("x"))
        except ValueError:
            ratio = 0.0
        if not 1.0 < ratio < float("inf"):
            self.fail(f"{value!r} is no ratio like 100x.", param, ctx)
        return ratio


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1),
                    help="Everything random follows from jax.random.key(SEED).")  # fmt: skip
RATE = click.option("--drop-rate", "-p", required=True, type=click.FloatRange(0, 1, max_open=True),
                    help="Probability that an entry of the delta is dropped.")  # fmt: skip
INCLUDE = click.option("--include", multiple=True, metavar="REGEX", help="Prune only what matches.")
EXCLUDE = click.option("--exclude", multiple=True, metavar="REGEX", help="Do not prune what matches.")
TASK = click.option("--task", "task_name", default="opinions", show_default=True,
                    help="opinions (generated), cola, sst2, mrpc or stsb.")  # fmt: skip
DATA_DIR = click.option("--data-dir", type=HERE, help="Folder with the task's parquet files; else the hub.")
TEXT = click.option("--text", type=PATH, help="Examples from a file with one text a line, instead of a task.")
DATA = click.option("--data", metavar="FILE|DIR|NAME", help="Your own examples: parquet, CSV, JSON lines or "
                    "Arrow, a folder of them, or a data set of the hub.")  # fmt: skip
TEXT_COLUMN = click.option("--text", metavar="COLUMN", help="With --data: of the texts.")
LIMIT = click.option("--limit", type=click.IntRange(1), help="Use at most so many examples of the split.")
LEARNING_RATE = click.option("--learning-rate", default=3e-4, show_default=True, type=float)
BATCH_SIZE = click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
DELTAS = click.option("--delta", "deltas", type=PATH, multiple=True,
                      help="An artifact made from MODEL, applied in memory first; several run side by "
                      "side.")  # fmt: skip
BESIDE = click.option("--beside", is_flag=True,
                      help="Run the delta's parts beside the base, as several deltas do, instead of "
                      "restoring the model: memory holds one base and the parts.")  # fmt: skip
ALLOW_CHANGED_FILES = click.option("--allow-changed-files", is_flag=True,
                                   help="Take the base's configuration and tokenizer files though they have "
                                   "changed since the delta was made.")  # fmt: skip
DTYPE = click.option("--dtype", type=click.Choice(["float32", "bfloat16"]),
                     help="What to compute in. Default: the checkpoint's.")  # fmt: skip
IGNORE = click.option("--ignore-config-field", "ignore_config_fields", multiple=True, metavar="NAME",
                      help="A field of config.json that changes nothing, though it is refused.")  # fmt: skip
BYTES_PER_PARAMETER = click.option("--bytes-per-parameter", type=click.FloatRange(0, min_open=True),
              help="Size of the whole file divided by the number of entries that are pruned.")  # fmt: skip


PARAMS = click.option("--params", metavar="PATH", help="Of an orbax checkpoint's tree the branch, joined by "
                      "dots. Default: params, where there is one.")  # fmt: skip
RENAME = click.option("--rename", metavar="REGEX=NAME", help="The base's name of a fine-tuned parameter: "
                      "what the pattern matches becomes NAME.")  # fmt: skip


def with_params(params: str | None, *paths: Path) -> tuple[Path, ...]:
    """The paths of a branch of orbax checkpoints; what is none of these stays as it is."""
    from darex_jax.files.orbax import find_orbax

    if params is None:
        return paths
    found = [find_orbax(path) is not None for path in paths]
    if not any(found):
        raise click.UsageError(f"--params names a branch of an orbax checkpoint; {paths[0]} is none.")
    return tuple(
        Path(f"{path}#{params}") if orbax else path for path, orbax in zip(paths, found, strict=True)
    )


def renaming(rename: str | None) -> Callable[[str], str] | None:
    """The function that --rename says."""
    if rename is None:
        return None
    from darex_jax.core.scope import compile_pattern

    pattern, mark, name = rename.partition("=")
    if not mark or not pattern:
        raise click.UsageError("--rename is REGEX=NAME, layers_=layers. say.")
    compiled = compile_pattern(pattern)
    return lambda parameter: str(compiled.sub(name, parameter))


def own_examples(command: Any) -> Any:
    """--data and the columns that go with it, but for --text, which some commands have already."""
    for option in (
        click.option("--metric", help="With --data: accuracy, f1, matthews, accuracy_and_f1, "
                     "pearson_and_spearman; of completions exact_match, token_accuracy, loss."),
        click.option("--completion", metavar="COLUMN", help="With --data: what a decoder writes."),
        click.option("--prompt", metavar="COLUMN", help="With --data: what a decoder is given."),
        click.option("--label", metavar="COLUMN",
                     help="With --data: texts or integers for classes, other numbers for a score."),
        click.option("--pair", metavar="COLUMN", help="With --data: of the second texts."),
        DATA,
    ):  # fmt: skip
        command = option(command)
    return command


def take_only_table(ctx: click.Context, options: dict[str, Any], task: str) -> Any:
    """`take_table` of a command whose --text is a column and nothing else.

    Args: task: the parameter of --task, which goes without --data.
    """
    table = take_table(options)
    if options.pop("text") is not None:
        raise click.UsageError("--text names a column of --data.")
    if table is not None and ctx.get_parameter_source(task) == ParameterSource.COMMANDLINE:
        raise click.UsageError("--task and --data are two places of examples; say one.")
    return table


def take_table(options: dict[str, Any]) -> Any:
    """Takes `own_examples` and --text out of a command's options: a `Table`, or None without --data.

    --text stays where there is no --data: there it is a file.
    """
    given = {name: options.pop(name) for name in ("data", "pair", "label", "prompt", "completion", "metric")}
    if given["data"] is None:
        if stray := next((name for name, value in given.items() if value is not None), None):
            raise click.UsageError(f"--{stray} names a column or a metric of --data.")
        return None
    from darex_jax.files.remote import is_url
    from darex_jax.tasks.table import Table

    if is_url(given["data"]):
        raise click.UsageError(f"--data {given['data']} has to be a path here; copy what it names first.")
    text, options["text"] = options.get("text"), None
    return Table(**given, text=None if text is None else str(text))
