"""Time to find q: the sweep against plain PyTorch, Algorithm 3 against the published scan.

    python benchmarks/find_q.py --fine FINE [--base BASE] [--data-dir DIR --task sst2] [--json FILE]

FINE is a fine-tuned MiniLM (`darex train`), BASE its base; without --data-dir the examples are generated.

The sweep: the metric for the same values of q, masks and examples. Plain PyTorch has precomputed masks, where
ours recomputes them; for every value and mask it rebuilds the pruned state dict, loads it into the model and
evaluates it, with batches padded to their longest row: 32 rows in data set order, or as many as ours and
sorted by length like ours. "from disk" also reads both models and draws the mask for every value. Everything
is warmed up; ours is also timed once including compilation. `loop` and `vmap` are one batch at four values.

The solver: q of every row of a layer with random weights. `scan` is the published loop over float16 tensors,
`rows` the time for the row sums of the layer's delta, `exact` the closed form on these, `emulated` the
published rule on these. Medians of rounds, with the fastest and the slowest.
"""

import math
import statistics
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from timing import begun, options_of, report, spread, timed

from darex_jax.choosing.pair import Pair, load_pair, split_in_scope
from darex_jax.core.bound import phi
from darex_jax.core.mask import random_mask
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.objectives import label_objective
from darex_jax.q.analytic import analytic_q
from darex_jax.q.per_layer import row_sums
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import EVALUATION_ROWS, encode, evaluation_batches, load_tokenizer, model_inputs

DROP_RATE, PROB = 0.99, 0.95
VALUES = [0.01, 0.014, 0.02, 0.028, 0.04, 0.057, 0.08, 0.11]
LAYERS = {"768 x 3072": (768, 3072), "4096 x 11008": (4096, 11008)}
ROUNDS = 5
ROWS = 32  # per batch of plain PyTorch


def each(function, *args, calls: int = 100):
    """As `timed`, per call of `calls` in a row, for functions that take microseconds."""
    seconds, result = timed(lambda: [function(*args) for _ in range(calls)])
    return seconds / calls, result[-1]


# The sweep.


def sweep(base: Path, fine: Path, task_name: str, data_dir: Path | None, examples: int) -> dict:
    model, params, base_params = load_pair(base, fine)
    start, delta = split_in_scope(params, base_params)
    task = load_task(task_name, data_dir)
    data = task.validation.select(slice(examples))
    tokenizer = load_tokenizer(fine)
    encoded = encode(tokenizer, data)
    by_length = np.argsort([len(ids) for ids in encoded.input_ids], kind="stable").tolist()
    batches = evaluation_batches(encoded)
    goal = label_objective(model, task, batches)

    def ours(masks: int, values: list[float], size: int) -> list[float]:
        models = Pair(model, params, start, delta, DROP_RATE, range(masks)).models
        rows = encode(tokenizer, data.select(slice(size)))
        some = label_objective(model, task, evaluation_batches(rows))
        return [some.measure(pruned(q)) for q in values for pruned in models]

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(fine).eval()
    names = set(flatten_names(base_params))
    state = {n: t.clone() for n, t in theirs.state_dict().items()}
    origin = {n: torch.tensor(np.asarray(x)) for n, x in flatten_names(base_params).items()}

    def plain(masks: int, values: list[float], ordered: bool) -> list[float]:
        kept = [
            {n: torch.tensor(np.asarray(x)) for n, x in flatten_names(mask).items()}
            for mask in (random_mask(jax.random.key(i), delta, DROP_RATE) for i in range(masks))
        ]
        order, size = (by_length, EVALUATION_ROWS) if ordered else (list(range(len(data))), ROWS)
        return [torch_metric(q, mask, order, size) for q in values for mask in kept]

    def from_disk(values: list[float]) -> list[float]:
        results = []
        for q in values:
            tuned = transformers.AutoModelForSequenceClassification.from_pretrained(fine).state_dict()
            transformers.AutoModel.from_pretrained(base)  # to time the reading; its values are in `origin`
            torch.manual_seed(0)
            drawn = {n: torch.rand(t.shape) < 1 - DROP_RATE for n, t in tuned.items() if n in names}
            results.append(torch_metric(q, drawn, list(range(len(data))), ROWS))
        return results

    def torch_metric(q: float, mask: dict, order: list[int], size: int) -> float:
        pruned = {}
        for name, tensor in state.items():
            if name not in names:
                pruned[name] = tensor
                continue
            d = tensor - origin[name]
            pruned[name] = origin[name] + torch.where(mask[name], d, 0.0) / q
        theirs.load_state_dict(pruned)
        logits = np.zeros((len(data), task.num_labels), np.float32)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            width = max(len(encoded.input_ids[i]) for i in rows)
            ids, attention, types = (np.zeros((len(rows), width), np.int64) for _ in range(3))
            for at, i in enumerate(rows):
                length = len(encoded.input_ids[i])
                ids[at, :length], attention[at, :length] = encoded.input_ids[i], 1
                types[at, :length] = encoded.token_type_ids[i]
            with torch.inference_mode():
                out = theirs(torch.tensor(ids), torch.tensor(attention), torch.tensor(types))
            logits[rows] = out.logits.numpy()
        return task.metric(logits, data.labels)

    cold, _ = timed(ours, 1, VALUES, examples)
    plain(1, VALUES[:1], True)
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        seconds.setdefault("ours", []).append((one := timed(ours, 1, VALUES, examples))[0])
        seconds.setdefault("plain, by length", []).append((two := timed(plain, 1, VALUES, True))[0])
        seconds.setdefault("plain, in order", []).append(timed(plain, 1, VALUES, False)[0])
        seconds.setdefault("plain, from disk", []).append(timed(from_disk, VALUES)[0])
    growth = {}
    for what, arguments in (
        ("4 masks", (4, VALUES, examples)), ("half the values", (1, VALUES[:4], examples)),
        ("half the examples", (1, VALUES, examples // 2)),
    ):  # fmt: skip
        timed(ours, *arguments)
        growth[what] = statistics.median(timed(ours, *arguments)[0] for _ in range(3))
    pruned = Pair(model, params, start, delta, DROP_RATE, (0,)).models[0]
    batch = model_inputs(batches[-1])

    def logits(q):
        return model(pruned(q), **batch).logits

    one_q, four = jax.jit(logits), jax.jit(jax.vmap(logits))
    some_q = jax.numpy.asarray(VALUES[:4])
    batched: dict[str, list[float]] = {"loop": [], "vmap": []}
    jax.block_until_ready((one_q(some_q[0]), four(some_q)))
    for _ in range(ROUNDS):
        batched["loop"].append(timed(lambda: jax.block_until_ready([one_q(q) for q in some_q]))[0])
        batched["vmap"].append(timed(lambda: jax.block_until_ready(four(some_q)))[0])
    evaluation = [timed(goal.measure, params)[0] for _ in range(ROUNDS)]
    rebuild = [timed(lambda q: jax.block_until_ready(pruned(q)), q)[0] for q in VALUES]
    return {
        "task": task_name, "examples": len(data), "values": VALUES, "with_compilation": cold,
        "largest_difference_of_metrics": float(np.abs(np.subtract(one[1], two[1])).max()),
        "seconds": {name: spread(s) for name, s in seconds.items()}, "growth": growth,
        "pruned_params": spread(rebuild), "evaluation": spread(evaluation),
        "four_values_of_one_batch": {name: spread(s) for name, s in batched.items()},
    }  # fmt: skip


# The solver.


def published_scan(delta: torch.Tensor, mean: torch.Tensor, eta: float, whole: bool = False) -> float:
    """The loop of the published code, in float16: computes row sums in every step and stops early.

    Args: whole: do not stop early, to time a visit of every value. Returns: the mean q.
    """
    c = delta * mean
    best = torch.full((len(delta),), 10_000.0, dtype=delta.dtype)
    q_of_row = torch.full((len(delta),), 1 - DROP_RATE)
    stopped = torch.zeros(len(delta), dtype=torch.bool)
    bound = math.log(2 / (1 - PROB))
    weight = eta**2 * float(phi(DROP_RATE))
    for step in range(int((1 - DROP_RATE) * 1000), 999):
        q = step * 0.001
        value = eta * ((1 - (1 - DROP_RATE) / q) * c.sum(1)) + weight * (c * c).sum(1) / (4 * q**2) + bound
        value = value.abs()
        better = value <= best
        stopped |= value >= best
        best, q_of_row = torch.where(better, value, best), torch.where(better, q, q_of_row)
        if not whole and stopped.float().mean() >= 0.8:
            break
    return float(q_of_row.mean())


def solver(eta: float = 0.4) -> dict:
    results = {}
    for name, (rows, columns) in LAYERS.items():
        rng = np.random.default_rng(0)
        delta = (2e-3 * rng.standard_normal((rows, columns))).astype(np.float32)
        mean = rng.standard_normal(columns).astype(np.float32)
        half = torch.tensor(delta).half(), torch.tensor(mean).half()
        on_device = {"w.weight": jax.numpy.asarray(delta)}, {"w.weight": jax.numpy.asarray(mean)}
        sums = tuple(map(np.asarray, jax.block_until_ready(row_sums(*on_device))["w.weight"]))
        analytic_q(*sums, DROP_RATE, eta)
        seconds: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            taken, _ = timed(lambda a=on_device: jax.block_until_ready(row_sums(*a)))
            seconds.setdefault("rows", []).append(taken)
            exact = each(analytic_q, *sums, DROP_RATE, eta)
            seconds.setdefault("exact", []).append(exact[0])
            emulated = timed(lambda s=sums: analytic_q(*s, DROP_RATE, eta, rule="published"))
            seconds.setdefault("emulated", []).append(emulated[0])
            scan = timed(published_scan, *half, eta)
            seconds.setdefault("scan", []).append(scan[0])
        results[name] = {
            "seconds": {key: spread(s) for key, s in seconds.items()},
            "mean_q": {
                "exact": float(exact[1].mean()),
                "emulated": float(emulated[1].mean()),
                "scan": scan[1],
            },
        }
        if delta.size < 1e7:  # takes minutes on the larger one
            taken, q = timed(published_scan, torch.tensor(delta), torch.tensor(mean), eta, True)
            results[name] |= {"seconds_of_a_scan_to_its_end": taken, "its_mean_q": q}
    return results


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--examples", type=int, default=200)
    options = begun(parser)
    swept = sweep(options.base, options.fine, options.task, options.data_dir, options.examples)
    report({"solver": solver(), "sweep": swept}, options.json)


if __name__ == "__main__":
    main()
