"""The picture of the README: how much of the fine-tuned metric is kept, against the bytes of the file.

    python experiments/frontier_picture.py

Read from `results/small/methods.jsonl` and `results/small/frontier.jsonl` (`darex experiment methods` and
`frontier`): MiniLM-L6, fine-tuned with AdamW. A point is the mean over SST-2, MRPC and STS-B of the restored
model's metric as a share of the fine-tuned model's; of a task with several fine-tunes their mean. Sizes that
one of the tasks lacks are left out. Writes `docs/images/frontier.svg`.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from darex_jax.study.rows import cell_of, read_rows

ROOT = Path(__file__).parent.parent
TASKS = ("sst2", "mrpc", "stsb")
LINES = {"distilled": "#1b7837", "SVD, 4 bits": "#2166ac", "DAREx-q": "#e08214", "DARE": "#b2182b"}
PARAMETERS = 22_713_216  # of MiniLM-L6, in float32


def main() -> None:
    rows = {}
    for study in ("methods", "frontier"):
        found = read_rows(ROOT / "experiments/results/small" / f"{study}.jsonl")
        rows |= {cell_of(row): row for row in found if "mean" in row}
    check_parameters(list(rows.values()))
    plt.rcParams.update({"svg.hashsalt": "frontier", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for way, color in LINES.items():
        line = points(rows, way)
        axes.plot(*zip(*line, strict=True), "o-", color=color, label=way, linewidth=2)
        for size, share in line:
            print(f"{way}: {size:,.0f} bytes, {share:.1%}")
    axes.axhline(1, color="gray", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(*zip(*((b, told(b)) for b in (1e4, 2e4, 1e5, 5e5, 2e6, 5e6)), strict=True))
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.08)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.set_xlabel(f"bytes of the whole file (the fine-tuned model: {4 * PARAMETERS / 1e6:.0f} MB)")
    axes.set_ylabel("share of the metric kept")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = ROOT / "docs" / "images" / "frontier.svg"
    figure.savefig(out, metadata={"Date": None, "Creator": None})


def check_parameters(rows) -> None:
    """`PARAMETERS` are those of the rows: the fullest file of all has nearly its bytes per parameter."""
    fullest = max(row["file_bytes"] / row["at"] for row in rows if "file_bytes" in row)
    assert 0.99 * PARAMETERS < fullest < 1.0001 * PARAMETERS, fullest


def points(rows, way: str) -> list[tuple[float, float]]:
    """Bytes and share of the metric at every size that all three tasks have."""
    shares: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for (name, own, at), row in rows.items():
        task, optimizer, _ = name.split("/")
        if own == way and optimizer == "adamw" and task in TASKS:
            whole = rows[name, "fine-tuned", None]["mean"]
            shares.setdefault(at, {}).setdefault(task, []).append((row["file_bytes"], row["mean"] / whole))
    means = [
        np.mean([np.mean(of, axis=0) for of in tasks.values()], axis=0)
        for _, tasks in sorted(shares.items())
        if len(tasks) == len(TASKS)
    ]
    return [(float(size), float(share)) for size, share in means]


def told(size: float) -> str:
    return f"{size / 1e6:g} MB" if size >= 1e6 else f"{size / 1e3:g} kB"


if __name__ == "__main__":
    main()
