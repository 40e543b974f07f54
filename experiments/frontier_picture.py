"""The picture of the README: how much of the fine-tuned metric is kept, against the bytes of the file.

    python experiments/frontier_picture.py

Read from the lines of `results/methods/TASK_adamw*.jsonl` (made by `methods.py`): MiniLM-L6, fine-tuned with
AdamW. A point is the mean over SST-2, MRPC and STS-B of the restored model's metric as a share of the
fine-tuned model's; of a task with several fine-tunes their mean. Sizes that one of the tasks lacks are left
out. Written to `docs/images/frontier.svg`.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
TASKS = ("sst2", "mrpc", "stsb")
LINES = {"distilled": "#1b7837", "SVD, 4 bits": "#2166ac", "DAREx-q": "#e08214", "DARE": "#b2182b"}


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "frontier", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for way, color in LINES.items():
        found = points(way)
        axes.plot(*zip(*found, strict=True), "o-", color=color, label=way, linewidth=2)
        for size, share in found:
            print(f"{way}: {size:,.0f} bytes, {share:.1%}")
    axes.axhline(1, color="gray", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(*zip(*((b, told(b)) for b in (2e4, 1e5, 5e5, 2e6, 5e6)), strict=True))
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.08)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    model = json.loads((ROOT / "experiments/results/glue_minilm_sst2.json").read_text())["fine_bytes"]
    axes.set_xlabel(f"bytes of the whole file (the fine-tuned model: {model / 1e6:.0f} MB)")
    axes.set_ylabel("share of the metric kept")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = ROOT / "docs" / "images" / "frontier.svg"
    figure.savefig(out, metadata={"Date": None, "Creator": None})


def points(way: str) -> list[tuple[float, float]]:
    """Bytes and share of the metric at every size that all three tasks have."""
    shares: dict[float, dict[str, list[tuple[float, float]]]] = {}
    for task in TASKS:
        for file in sorted((ROOT / "experiments/results/methods").glob(f"{task}_adamw*.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            whole = next(row["mean"] for row in rows if row["way"] == "fine-tuned")
            for row in rows:
                if row["way"] == way and "mean" in row:
                    at = shares.setdefault(row["bytes"], {}).setdefault(task, [])
                    at.append((row["file_bytes"], row["mean"] / whole))
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
