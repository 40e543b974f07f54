"""What the experiments with AdamR share: the optimizers, the rows of a table, and its cells."""

import os
import platform
from importlib.metadata import version

from darex_jax.choosing.pair import Pair, scored
from darex_jax.choosing.searched import find_q
from darex_jax.evaluation.objectives import Objective
from darex_jax.q.search import SearchResult, authors_walk

DROP_RATES = (0.9, 0.99, 0.999)
HEADINGS = [
    "| optimizer | delta rms, largest | fine-tuned | drop rate | DARE | q by labels | q by outputs "
    "| gain kept |",
    "|" + " --- |" * 8,
]


def optimizers(l1: str) -> dict[str, dict[str, object]]:
    """The recipes by name: AdamW, AdamR-L2 at three strengths, AdamR-L1 at the strength `l1`."""
    pulls = {f"adamr-l2-{w}": {"optimizer": "adamr", "weight_decay": w} for w in (0.002, 0.01, 0.05)}
    last = {"optimizer": "adamr", "norm": "l1", "weight_decay": float(l1)}
    return {"adamw": {"optimizer": "adamw", "weight_decay": 0.01}, **pulls, f"adamr-l1-{l1}": last}


def machine() -> dict[str, object]:
    """Where the numbers come from."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("jax", "flax", "optax", "numpy")},
    }


def authors_search(objective: Objective, pair: Pair, models) -> SearchResult:
    """The authors' walk in steps of 1 - p (at 0.9 half of it), to 10 (at 0.9 five) times that.

    Args: models: those of the pair that are looked at.
    """
    density = pair.density
    high, step = (5 * density, density / 2) if density >= 0.05 else (10 * density, density)
    return find_q(objective, models, (density, high, step), search=authors_walk)


def scored_row(pair: Pair, q_v: float, q_e: float, score) -> dict[str, object]:
    """By method, q and what `scored` says of it."""
    row: dict[str, object] = {"drop_rate": pair.drop_rate}
    for method, q in (("dare", pair.density), ("q_v", q_v), ("q_e", q_e)):
        row[method] = {"q": q, **scored(score, pair.models, q)}
    return row


def table_rows(results: list[dict], floor: str) -> list[str]:
    """The lines of the table. Args: floor: the name of the score from which a gain is counted."""
    lines = []
    for r in results:
        run = [r["optimizer"], f"{r['delta_rms']:.2e}, {r['delta_max']:.2e}", f"{r['fine_tuned']:.3f}"]
        gain = r["fine_tuned"] - r[floor]
        for row in r["rates"]:
            cells = [row[method] for method in ("dare", "q_v", "q_e")]
            kept = (
                [f"{(c['mean'] - r[floor]) / gain:.0%}" for c in (cells[0], best(cells[1:]))]
                if gain > 0
                else []
            )
            texts = [f"{c['mean']:.3f} ± {c['std']:.3f} (q {c['q']:.4g})" for c in cells]
            line = [*run, str(row["drop_rate"]), *texts, ", ".join(kept) or "no gain"]
            lines.append(f"| {' | '.join(line)} |")
    return lines


def best(cells: list[dict]) -> dict:
    return max(cells, key=lambda cell: cell["mean"])
