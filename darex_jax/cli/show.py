"""Terminal output: tables, warnings, progress bars, sizes."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from darex_jax.cli.stores import as_given
from darex_jax.core.errors import DarexWarning


def plain(text: str) -> str:
    """Escapes text for a terminal: names and messages may come from untrusted files.

    Control characters, line breaks and bidirectional marks become escapes.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def warnings_shown() -> Iterator[list[str]]:
    """Prints each of the library's warnings once, as a line on stderr; yields their list, for --json."""
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", DarexWarning)
        default = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, DarexWarning):
                default(message, category, *place, **more)
            elif (text := plain(str(message))) not in shown:
                shown.append(text)
                click.echo(f"warning: {text}", err=True)

        warnings.showwarning = show
        yield shown


def warn(text: str) -> None:
    """Gives a warning of the library's kind, which `warnings_shown` prints."""
    warnings.warn(text, DarexWarning, stacklevel=2)


def warned() -> list[str]:
    """The warnings so far, for --json."""
    return click.get_current_context().obj or []


def family_of(fine: Any, base: Any) -> str | None:
    """The model family of two checkpoints."""
    return fine.config.get("model_type") or base.config.get("model_type")


HALF = 0.5  # share of the memory from which on a model is called large
PEAKS = {
    "eval": 2.5,
    "generate": 3.5,
    "sample": 3.5,
    "find-q": 4.7,
    "find-q --one-copy": 2.1,
}  # peak memory relative to the model, from benchmarks/memory.py


def say_if_large(command: str, model: Any) -> None:
    """Warns on stderr, before anything is loaded, if a model is larger than half of the memory."""
    from darex_jax.files.checkpoint import Checkpoint

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with Checkpoint(model) as checkpoint:
        size = checkpoint.nbytes
    if size > HALF * memory:
        click.echo(
            f"{model} is {bytes_text(size)}, this machine has {bytes_text(memory)} of memory; {command} "
            f"needs about {PEAKS[command]:g} times the model.",
            err=True,
        )


def found_scope(names: list[str]) -> str:
    """A short description of the parameters pruned in an unknown family."""
    from darex_jax.core.scope import starred

    patterns = list(dict.fromkeys(map(starred, names)))
    return f"the matrices of repeated blocks: {few(patterns)}"


def few(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a table of names and texts, with a title: escaped by `plain`, with URLs as they were given."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    heading = Text(plain(as_given(title)))  # Text: no markup
    console.print(heading, style="bold", soft_wrap=True, highlight=False)
    table = Table(show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(plain(name)), Text(plain(as_given(str(value)))))
    console.print(table)


def q_text(q: float | Mapping[str, float]) -> str:
    """One q, or the range of many."""
    values = sorted(set(q.values())) if isinstance(q, Mapping) else [q]
    if len(values) == 1:
        return f"{values[0]:.6g}"
    return f"{values[0]:.4g} to {values[-1]:.4g}, {len(values)} values"


@contextmanager
def _bar(**options: Any) -> Iterator[Any]:
    """A tqdm bar that leaves no empty line if the work fails before its first step."""
    from tqdm import tqdm

    with tqdm(**options) as bar:
        try:
            yield bar
        except BaseException:
            bar.leave = bar.leave and bar.n > 0
            raise


@contextmanager
def byte_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for work of over two seconds. The callback counts bytes and is thread-safe."""
    with _bar(
        desc=title,
        total=total,
        unit="B",
        unit_scale=True,
        delay=2,
        disable=True if quiet else None,
        leave=False,
    ) as bar:
        yield bar.update


@contextmanager
def step_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[Any], None]]:
    with _bar(desc=title, total=total, unit="step", disable=quiet, mininterval=1.0) as bar:

        def on_step(record: Any) -> None:
            bar.set_postfix(loss=f"{record.loss:.3f}", refresh=False)
            bar.update(1)
            if bar.n >= total:  # later output goes below a finished bar
                bar.close()

        yield on_step


@contextmanager
def training_bar(title: str, quiet: bool) -> Iterator[Callable[[int, Any], None]]:
    """A bar for a training's metrics: loss, rate, speed, the delta's size, the validation metric.

    A resumed training starts at its step.
    """
    shown: dict[str, str] = {}
    with _bar(desc=title, unit="step", disable=quiet, mininterval=1.0, dynamic_ncols=True) as bar:

        def on_step(steps: int, line: Any) -> None:
            if bar.total is None:
                bar.reset(steps)
                bar.update(line["step"])
            shown["loss"], shown["lr"] = f"{line['loss']:.3f}", f"{line['learning_rate']:.1e}"
            if "examples_per_second" in line:
                shown["ex/s"] = f"{line['examples_per_second']:.0f}"
            if "delta_rms" in line:
                shown["delta"] = f"{line['delta_rms']:.1e}(max {line['delta_max']:.1e})"
            if "validation" in line:
                shown["val"] = f"{line['validation']:.3f}"
            bar.set_postfix(shown, refresh=False)
            bar.update(1)
            if bar.n >= steps:  # later output goes below a finished bar
                bar.close()

        yield on_step


@contextmanager
def point_bar(title: str, quiet: bool) -> Iterator[Callable[[float, float], None]]:
    """A counter of visited points, whose total is unknown, with the last point and its value."""
    with _bar(desc=title, unit=" points", disable=quiet, leave=False) as bar:

        def on_value(point: float, value: float) -> None:
            bar.set_postfix_str(f"{point:.4g}: {value:.5f}")
            bar.update(1)

        yield on_value


@contextmanager
def problem_bar(title: str, total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with the numbers of answered and of correct problems."""
    with _bar(desc=title, total=total, unit="problem", disable=quiet) as bar:

        def on_batch(answered: int, correct: int) -> None:
            bar.set_postfix(correct=correct, refresh=False)
            bar.update(answered - bar.n)

        yield on_batch


@contextmanager
def text_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of texts that a model writes."""
    with _bar(desc="writing", total=total, unit="text", disable=quiet) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def look_bar(total: int, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A bar for a training that reports evaluations; shown from the first one on."""
    with ExitStack() as stack:
        bar: Any = None

        def on_look(look: Any) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(_bar(desc="training", total=total, unit="step", disable=quiet))
            bar.set_postfix(loss=f"{look.loss:.4f}", agreement=f"{look.agreement:.3f}", refresh=False)
            bar.update(look.step - bar.n)

        yield on_look


@contextmanager
def block_bar(quiet: bool) -> Iterator[Callable[[int, int, Any], None]]:
    """A bar of layers, with the relative error of the last one's output."""
    with _bar(desc="training", unit="layer", disable=quiet) as bar:

        def on_block(done: int, count: int, look: Any) -> None:
            bar.total = count
            bar.set_postfix(error=f"{look.loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        yield on_block


@contextmanager
def tried_bar(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows the current step and the elapsed time."""
    with _bar(unit=" tried", disable=quiet, leave=False) as bar:

        def on_try(what: str) -> None:
            bar.set_description(what)
            bar.update(1)

        yield on_try
