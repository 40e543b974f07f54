"""Training metrics as a JSON lines file, and as a plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darex_jax.core.errors import FileError
from darex_jax.files.atomic import atomic_file, write_whole
from darex_jax.files.paths import read_text
from darex_jax.training.loop import StepRecord


@contextmanager
def metrics_file(path: Path, examples_a_step: int) -> Iterator[Callable[[StepRecord], dict[str, Any]]]:
    """Yields a function that appends a step's record to `path` as a JSON line, and returns what it wrote.

    It adds `examples_per_second`, measured since the previous record, and omits fields that are None. A
    training resumed from step n keeps the lines of the steps before n.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clock: float | None = None
    file = None

    def write(record: StepRecord) -> dict[str, Any]:
        nonlocal clock, file
        line = {name: value for name, value in record._asdict().items() if value is not None}
        now = time.monotonic()
        if clock is not None:
            line["examples_per_second"] = round(examples_a_step / max(now - clock, 1e-9), 2)
        clock = now
        if file is None:  # the first record of this call is the step to resume from
            before = [line for line in read_metrics(path) if line["step"] < record.step]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in before))
            file = path.open("ab", buffering=0)
        try:
            rest = json.dumps(line).encode() + b"\n"
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}.") from error
        return line

    try:
        yield write
    finally:
        if file is not None:
            file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without an incomplete last one; [] if it does not exist."""
    lines: list[dict[str, Any]] = []
    for text in read_text(path).splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot_metrics(lines: list[dict[str, Any]], validation_name: str, path: Path) -> None:
    """Loss and learning rate, the delta's size, and the validation metric against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def points(name: str) -> tuple[list[float], list[float]]:
        known = [line for line in lines if name in line]
        return [line["step"] for line in known], [line[name] for line in known]

    validated = any("validation" in line for line in lines)
    figure = Figure(figsize=(4.2 * (2 + validated), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, delta, *rest = figure.subplots(1, 2 + validated, squeeze=False)[0]
    loss.plot(*points("loss"), color="tab:blue", linewidth=0.8)
    loss.set(xlabel="step", title="loss")
    rate = loss.twinx()
    rate.plot(*points("learning_rate"), color="tab:gray", linestyle=":")
    rate.set_ylabel("learning rate (dotted)", color="tab:gray")
    delta.plot(*points("delta_rms"), color="tab:orange", label="root mean square")
    delta.plot(*points("delta_max"), color="tab:red", linestyle="--", label="largest")
    delta.set(xlabel="step", title="size of the delta", yscale="log")
    delta.legend(frameon=False)
    for axes in rest:
        axes.plot(*points("validation"), "o-", color="tab:green", markersize=3)
        axes.set(xlabel="step", title=f"validation: {validation_name}")
    for axes in (loss, delta, *rest):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a Matplotlib figure atomically, in the format of the suffix of `path`."""
    from matplotlib import rc_context

    with atomic_file(path) as file, open(file, "wb", closefd=False) as stream:
        dated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        with rc_context({"svg.hashsalt": "darex"}):  # the same figure is the same file
            figure.savefig(stream, format=path.suffix[1:] or "png", dpi=130, **dated)
