"""What as many bytes hold when they are trained from the base with labels: two rivals of a pruned delta.

    python experiments/rivals.py --data-dir DIR

LoRA of rank 1 on every linear layer (arXiv:2106.09685), its factors in bfloat16 or rounded to 4 bits, and the
values of a random subspace (arXiv:1804.08838), in bfloat16, whose places a key defines: the same subspace as
`distilled, random` of `methods.py`. Trained as the fine-tunes are: their steps of 32 examples with labels,
AdamW's schedule, and the learning rate that `distill` gives such values. Bytes are those of the whole file.
Each finished training is a line of `results/rivals/TASK.jsonl` and is not run again.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from adamr_common import machine
from adamr_glue import BUDGETS

from darex_jax.core.delta import apply_delta
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import combine, flatten_names, unflatten_names
from darex_jax.evaluation.classification import predict
from darex_jax.files.checkpoint import Checkpoint, save_params
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job, prune_parts
from darex_jax.methods.budget import Budget
from darex_jax.methods.dare import dare
from darex_jax.parts.low_rank import LowRank
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts, values_of
from darex_jax.parts.values import Values
from darex_jax.runs.demo import demo_weights
from darex_jax.tasks import load_task
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.training.fine_tune import classifier_for, fine_tune
from darex_jax.training.loop import Recipe

RESULTS = Path(__file__).parent / "results" / "rivals"
SIZES = (0.005, 0.002, 0.001, 0.0005)  # bytes a parameter of the random subspace's values
HEAD = "classifier."  # what its parameters' names begin with
LEARNING_RATE = 2e-4  # of a dense delta, as in `distill`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc", "stsb"], choices=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    parser.add_argument("--sizes", nargs="*", type=float, default=SIZES, help="of the random subspace")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for seed in options.seeds:
            for size in [None, *options.sizes]:
                run(task, options.data_dir, seed, size)


def run(task_name: str, data_dir: Path | None, seed: int, size: float | None) -> None:
    """Trains one rival: a random subspace of so many bytes a parameter; None is LoRA."""
    file = RESULTS / f"{task_name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if any((row["seed"], row["size"]) == (seed, size) for row in rows):
        return
    task, tokenizer, key = (
        load_task(task_name, data_dir),
        load_tokenizer(demo_weights()),
        jax.random.key(seed),
    )
    body, base = load_model(demo_weights())
    model, start = classifier_for(task, body, base, jax.random.fold_in(key, 0))
    train, test = encode(tokenizer, task.train), encode(tokenizer, task.test.select(slice(500)))
    begun = time.monotonic()
    known = {n: x for n, x in flatten_names(start).items() if not n.startswith(HEAD)}
    parts = lora(known, key) if size is None else subspace(known, size, seed)
    rival = Rival(model, start, parts)
    recipe = Recipe(learning_rate=LEARNING_RATE, steps=BUDGETS[task_name][0], weight_decay=0.0)

    def on_step(record) -> None:
        if record.step % 100 == 0:
            print(f"{task_name} {size}: step {record.step} loss {record.loss:.4f}", flush=True)

    order = jax.random.fold_in(key, 1)
    trained, _ = fine_tune(rival, rival.begin(), train, recipe, key=order, pretrained={}, on_step=on_step)
    seconds = time.monotonic() - begun
    for bits in (None, 4) if size is None else (None,):
        found = {name: rounded(each, bits) for name, each in rival.parts_of(trained).items()}
        with tempfile.TemporaryDirectory() as folder:
            fine, path = Path(folder) / "fine", Path(folder) / "delta.safetensors"
            merged = apply_delta(combine(start, trained["head"]), as_stored(found, parts))
            save_params(fine, merged, model.config.to_hf(), companions_from=demo_weights())
            file_bytes = write(path, fine, as_stored(found, parts), seed, size, bits)
            logits = predict(*load_model(demo_weights(), delta=path), evaluation_batches(test))
        row = {
            "task": task_name, "way": "labels, LoRA" if size is None else "labels, random", "seed": seed,
            "size": size, "bits": bits, "file_bytes": file_bytes,
            "entries": sum(map(np.size, known.values())),
            "mean": task.metric(logits, test.labels), "metric_name": task.metric_name,
            "seconds": round(seconds, 1), **machine(),
        }  # fmt: skip
        rows.append(row)
        print(f"{task_name} {row['way']} {bits}: {row['mean']:.3f}, {file_bytes:,} bytes", flush=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Rival:
    """A classifier whose delta is parts; what is trained is their values, times a rate of their own, and the
    head's parameters."""

    def __init__(self, model, start, parts: dict[str, Parts]) -> None:
        self.model, self.start = model, start
        self.parts = {
            name: each.map(lambda p: getattr(p, "located", lambda p=p: p)()) for name, each in parts.items()
        }
        (part,) = next(iter(self.parts.values())).parts
        count = sum(len(v) for each in self.parts.values() for p in each.parts for v in values_of(p).values())
        density = count / sum(math.prod(each.shape) for each in self.parts.values())
        self.rate = 1 / (math.sqrt(density) if part.kind == "low_rank" else density)

    def begin(self) -> dict:
        head = {n: x for n, x in flatten_names(self.start).items() if n.startswith(HEAD)}
        values = {
            f"{name}.{field}": jnp.asarray(v.numbers, jnp.float32) / self.rate
            for name, each in self.parts.items()
            for field, v in values_of(each.parts[0]).items()
        }
        return {"head": unflatten_names(head), "values": unflatten_names(values)}

    def parts_of(self, trained) -> dict[str, Parts]:
        values = flatten_names(trained["values"])

        def of(name: str, part):
            own = {field: Values(values[f"{name}.{field}"] * self.rate) for field in values_of(part)}
            return replace(part, **own)

        return {name: each.map(lambda part, name=name: of(name, part)) for name, each in self.parts.items()}

    def __call__(self, trained, *inputs, dropout_key=None):
        params = apply_delta(combine(self.start, trained["head"]), self.parts_of(trained))
        return self.model(params, *inputs, dropout_key=dropout_key)


def linear(params) -> dict:
    """The weights of the layers' linear maps."""
    return {name: x for name, x in params.items() if ".layer." in name and np.ndim(x) == 2}


def lora(params, key: jax.Array) -> dict[str, Parts]:
    """Rank 1: A uniform within 1 / sqrt(in), B zero."""
    found = {}
    for i, (name, leaf) in enumerate(linear(params).items()):
        out, width = np.shape(leaf)
        right = (
            jax.random.uniform(jax.random.fold_in(key, 2 + i), (1, width), minval=-1, maxval=1) * width**-0.5
        )
        factors = Values(jnp.zeros((out, 1))), Values(right)
        found[name] = Parts((LowRank(*factors, np.asarray(np.float32(1)), (out, width)),), (out, width))
    return found


def subspace(params, size: float, seed: int) -> dict[str, Parts]:
    """The entries that a key chooses, all zero; bfloat16 values of so many bytes a parameter of the model."""
    zeros = {name: np.zeros(np.shape(leaf), np.float32) for name, leaf in linear(params).items()}
    density = size / 2 * sum(map(np.size, params.values())) / sum(map(np.size, zeros.values()))
    return dare(zeros, Budget(drop_rate=1 - density), key=jax.random.key(seed), q=1.0, dtype=jnp.float32)


def as_stored(found: dict[str, Parts], parts: dict[str, Parts]) -> dict[str, Parts]:
    """Values in the parts they came from: random ones without their places."""
    return {
        name: Parts(
            tuple(
                replace(own, values=new.values) if own.kind == "random" else new
                for own, new in zip(parts[name].parts, each.parts, strict=True)
            ),
            each.shape,
        )
        for name, each in found.items()
    }


def write(
    path: Path, fine: Path, parts: dict[str, Parts], seed: int, size: float | None, bits: int | None
) -> int:
    def make_parts(deltas):
        return {name: parts.get(name, Parts((), np.shape(x))) for name, x in deltas.items()}

    made_by = {
        "method": "distilled", "key": (0, seed), "budget": {"bytes_per_parameter": size or 0.005},
        "options": {"bits": bits}, "evidence": {},
    }  # fmt: skip
    with Checkpoint(demo_weights()) as b, Checkpoint(fine) as f:
        job = Job(b, f, path, choose_scope("bert"))
        return prune_parts(job, make_parts, leafwise=False, made_by=made_by).file_bytes


if __name__ == "__main__":
    main()
