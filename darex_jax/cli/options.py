"""Options that several commands share."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from darex_jax.cli.show import warn
from darex_jax.cli.stores import HERE, PATH


class Ratio(click.ParamType):  # type: ignore[type-arg]  # older versions are not generic
    """`100x`: a hundredth of the fine-tuned model."""

    name = "RATIOx"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            ratio = float(str(value).removesuffix("x"))
        except ValueError:
            ratio = 0.0
        if not 1.0 < ratio < float("inf"):
            self.fail(f"{value!r} is not a ratio such as 100x.", param, ctx)
        return ratio


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1),
                    help="Seed of all randomness, as jax.random.key(SEED).")  # fmt: skip
RATE = click.option("--drop-rate", "-p", required=True, type=click.FloatRange(0, 1, max_open=True),
                    help="Probability that an entry of the delta is dropped.")  # fmt: skip
INCLUDE = click.option("--include", multiple=True, metavar="REGEX",
                       help="Prune what matches, instead of the default scope.")  # fmt: skip
EXCLUDE = click.option("--exclude", multiple=True, metavar="REGEX", help="Do not prune what matches.")
TASK = click.option("--task", "task_name", default="opinions", show_default=True,
                    help="opinions (generated), cola, sst2, mrpc or stsb.")  # fmt: skip
DATA_DIR = click.option("--data-dir", type=HERE, help="Folder of the task's parquet files. Default: the hub.")
DIFFICULTY = click.option("--difficulty", default=3, show_default=True, type=click.IntRange(1, 10),
                          help="Maximum number of steps of a generated word problem.")  # fmt: skip
TEXT = click.option("--text", type=PATH, help="A file with one text per line, instead of a task. "
                    "With --data: column of the texts.")  # fmt: skip
DATA = click.option("--data", metavar="FILE|DIR|NAME", help="Your own examples: parquet, CSV, JSON lines or "
                    "Arrow, a folder of them, or a data set of the hub.")  # fmt: skip
TEXT_COLUMN = click.option("--text", metavar="COLUMN", help="With --data: column of the texts.")
LIMIT = click.option("--limit", type=click.IntRange(1), help="Maximum number of examples of the split.")
LEARNING_RATE = click.option("--learning-rate", default=3e-4, show_default=True, type=float)
BATCH_SIZE = click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
DELTAS = click.option("--delta", "deltas", type=PATH, multiple=True,
                      help="An artifact made from MODEL, applied in memory; several are run side by "
                      "side.")  # fmt: skip
BESIDE = click.option("--beside", is_flag=True,
                      help="Run the delta's parts beside the base, as with several deltas, instead of "
                      "restoring the model: memory holds one base and the parts.")  # fmt: skip
ALLOW_CHANGED_FILES = click.option("--allow-changed-files", is_flag=True,
                                   help="Use the base's configuration and tokenizer files even if they "
                                   "have changed since the delta was made.")  # fmt: skip
DTYPE = click.option("--dtype", type=click.Choice(["float32", "bfloat16"]),
                     help="Compute dtype. Default: the checkpoint's.")  # fmt: skip
IGNORE = click.option("--ignore-config-field", "ignore_config_fields", multiple=True, metavar="NAME",
                      help="Accept a field of config.json that changes no output.")  # fmt: skip


class Finite(click.FloatRange):
    """Without the infinity and NaN that a range takes."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{number} is not a finite number.", param, ctx)


BYTES_PER_PARAMETER = click.option("--bytes-per-parameter", type=Finite(0, min_open=True),
              help="Size of the whole file divided by the number of pruned entries.")  # fmt: skip


PARAMS = click.option("--params", metavar="PATH", help="Branch of an orbax checkpoint's tree, joined by "
                      "dots. Default: params, if it exists.")  # fmt: skip
RENAME = click.option("--rename", metavar="REGEX=NAME", help="Map fine-tuned names to the base's: "
                      "matches of the pattern become NAME.")  # fmt: skip


def with_params(params: str | None, *paths: Path) -> tuple[Path, ...]:
    """Adds a branch to the paths of orbax checkpoints; other paths are unchanged."""
    from darex_jax.files.orbax import find_orbax

    if params is None:
        return paths
    found = [find_orbax(path) is not None for path in paths]
    if not any(found):
        raise click.UsageError(f"--params is a branch of an orbax checkpoint, but {paths[0]} is not one.")
    return tuple(
        Path(f"{path}#{params}") if orbax else path for path, orbax in zip(paths, found, strict=True)
    )


def typed(option: str) -> bool:
    """Whether the user gave this option of the running command."""
    return click.get_current_context().get_parameter_source(option) == ParameterSource.COMMANDLINE


def has_files(task: str | None) -> bool:
    """Whether this task's examples are in files, not generated."""
    return task not in (None, "opinions", "word-problems")


def check_data_dir(task: str | None, data_dir: Path | None) -> None:
    """Raises: UsageError if --data-dir is given without a --task that has files."""
    if data_dir is not None and not has_files(task):
        raise click.UsageError("--data-dir is the folder of a --task; pass the task as well.")


def check_difficulty(task: str | None) -> None:
    """Raises: UsageError if --difficulty is given and the task is another than word-problems."""
    if typed("difficulty") and task != "word-problems":
        raise click.UsageError("--difficulty is of generated problems: pass --task word-problems.")


def given_files(*given: Any) -> list[Path]:
    """Those of the values given as inputs that are paths of this machine."""
    return [Path(value) for value in given if value is not None and Path(value).exists()]


def warn_of_idle_patterns(
    names: Collection[str], include: Sequence[str], exclude: Sequence[str], rename: str | None
) -> None:
    """Warns about patterns that match no parameter of the fine-tuned model."""
    from darex_jax.core.scope import compile_pattern

    given = [("--include", pattern) for pattern in include] + [("--exclude", pattern) for pattern in exclude]
    given += [] if rename is None else [("--rename", rename.partition("=")[0])]
    for option, pattern in given:
        if not any(map(compile_pattern(pattern).search, names)):
            warn(f"{option} {pattern!r:.80} matches no parameter, such as {min(names, default='none'):.80}.")


def renaming(rename: str | None) -> Callable[[str], str] | None:
    """The function described by --rename."""
    if rename is None:
        return None
    from darex_jax.core.scope import compile_pattern

    pattern, mark, name = rename.partition("=")
    if not mark or not pattern:
        raise click.UsageError("--rename must be REGEX=NAME, such as layers_=layers.")
    if "\\" in name:
        raise click.UsageError("--rename: NAME is plain text, into which no groups of REGEX can be put.")
    compiled = compile_pattern(pattern)
    return lambda parameter: str(compiled.sub(name, parameter))


def own_examples(command: Any) -> Any:
    """Adds --data and its columns, except --text, which some commands already have."""
    for option in (
        click.option("--metric", help="With --data: accuracy, f1, matthews, accuracy_and_f1, "
                     "pearson_and_spearman; for completions exact_match, token_accuracy, loss."),
        click.option("--completion", metavar="COLUMN", help="With --data: column of completions (decoders)."),
        click.option("--prompt", metavar="COLUMN", help="With --data: column of prompts (decoders)."),
        click.option("--label", metavar="COLUMN",
                     help="With --data: strings or integers for classes, other numbers for a score."),
        click.option("--pair", metavar="COLUMN", help="With --data: column of the second texts."),
        DATA,
    ):  # fmt: skip
        command = option(command)
    return command


def take_only_table(options: dict[str, Any], task: str) -> Any:
    """`take_table` for a command whose --text is only a column.

    Args: task: the parameter of --task, which excludes --data.
    """
    table = take_table(options)
    if options.pop("text") is not None:
        raise click.UsageError("--text is a column of --data: pass --data as well.")
    if table is not None and typed(task):
        raise click.UsageError("pass either --task or --data, not both.")
    return table


def take_table(options: dict[str, Any]) -> Any:
    """Removes `own_examples` and --text from a command's options: a `Table`, or None without --data.

    Without --data, --text is kept: it is a file.
    """
    given = {
        name: options.pop(name, None) for name in ("data", "pair", "label", "prompt", "completion", "metric")
    }
    if given["data"] is None:
        if stray := next((name for name, value in given.items() if value is not None), None):
            raise click.UsageError(f"--{stray} is a column or a metric of --data: pass --data as well.")
        return None
    from darex_jax.files.remote import is_url
    from darex_jax.tasks.table import Table

    if is_url(given["data"]):
        raise click.UsageError(f"--data {given['data']} must be a local path; copy it first.")
    text, options["text"] = options.get("text"), None
    return Table(**given, text=None if text is None else str(text))
