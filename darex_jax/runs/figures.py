"""Plots of choosing q: the searched curve, and every layer's q."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from darex_jax.choosing.table import curve_axis
from darex_jax.training.record import save_figure


def log_ticks(axes: Any) -> None:
    """A logarithmic x axis with ticks 0.01, 0.03, 0.1; Matplotlib's labels collide within a decade."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=(3,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")


def plot_curve(report: dict[str, Any], path: Path) -> bool:
    """Plots the searched curve, and every layer's q if they differ; False if there is neither."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = (
        {n: q for n, q in report["q"].items() if n.endswith("weight")}
        if isinstance(report["q"], dict)
        else {}
    )
    different = len(set(layers.values())) > 1
    panels = [panel for panel, there in (("curve", "curve" in report), ("layers", different)) if there]
    if not panels:
        return False
    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.grid(alpha=0.3)
        if panel == "curve":
            finite = [point for point in report["curve"] if point[1] is not None]
            axes.plot(*zip(*finite, strict=True), "o-", markersize=3)
            axis = curve_axis(report["objective"], report["scope"])
            axes.set(xlabel=axis, ylabel=report["value_name"])
            if axis != "epoch":
                log_ticks(axes)
                taken = report.get(axis)
                if taken is not None:
                    axes.axvline(taken, color="tab:red", linestyle="--", label=f"{axis} {taken:.4g}")
                    axes.legend()
        else:
            axes.plot(list(layers.values()), "o", markersize=3)
            axes.axhline(1.0 - report["drop_rate"], color="tab:red", linestyle="--", label="DARE")
            axes.set(xlabel="weight, from input to output", ylabel="q", yscale="log")
            axes.legend()
    save_figure(figure, path)
    return True
