"""Distilling a fine-tuned MiniLM: the command as a whole, and its steps against PyTorch's.

    python benchmarks/distill.py --fine FINE [--base BASE] [--data-dir DIR --task sst2] [--json FILE]
                                 [--also mrpc=FINE2 ...]

FINE is a fine-tuned MiniLM (`darex train`), BASE its base; without --data-dir the texts are generated.

`commands`: of the task and of each other one, seconds, seconds of all cores, of these the kernel's, and peak
memory of `darex prune --method distilled`, 300 steps, from the first import to the file. `steps`: `STEPS`
steps on the same batches and the same factors, not rounded. Ours is `dx.distill`, with a few evaluations
on one held-out batch: once with compilation, then without. PyTorch trains that loss with Adam, eagerly, and
evaluates nothing: a weight is the base's plus the product of the factors (`torch.func.functional_call`).
Rounds alternate; medians with the fastest and the slowest.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from timing import begun, options_of, report, spread, timed

import darex_jax as dx
from darex_jax.core.tree import flatten_names
from darex_jax.methods.evidence import Evidence
from darex_jax.runs.evidence import gather
from darex_jax.tasks.source import Source
from darex_jax.training.distill import distill

AT = 0.005  # bytes per parameter
STEPS, ROUNDS = 48, 3


def command(base: Path, fine: Path, source: Source) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "darex_jax", "prune", base, fine, f"{folder}/delta", "--json"]
        line += ["--method", "distilled", "--bits", 4, "--bytes-per-parameter", AT, "--steps", 300]
        line += ["--task", source.task, "--limit", source.limit]
        line += ["--data-dir", source.data_dir] if source.data_dir else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with open(f"{folder}/told", "w+") as told:
            process = subprocess.Popen([str(word) for word in line], stdout=told, env=environment)
            seconds, (_, status, used) = timed(os.wait4, process.pid, 0)
            if status:
                sys.exit("the command failed.")
            told.seek(0)
            report = json.load(told)
    measured = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}
    measured |= {"kernel_seconds": used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}
    return measured | {k: report[k] for k in ("bytes", "agreement", "held_out_loss")}


def steps(base: Path, fine: Path, source: Source) -> dict:
    evidence, _ = gather(base, fine, source, ("linear_layers", "train"), steps=STEPS)
    trainer = evidence.train
    start = flatten_names(trainer.start)
    delta = {n: np.asarray(x) - np.asarray(start[n]) for n, x in flatten_names(trainer.fine).items()}
    kept = {}

    def keep(parts, bits):
        kept.update(
            {name: each for name, each in parts.items() if "low_rank" in {p.kind for p in each.parts}}
        )
        return parts

    only = Evidence(linear_layers=evidence.linear_layers, train=keep)
    dx.distilled(delta, dx.Budget(bytes_per_parameter=AT), only, key=jax.random.key(0), bits=4)
    batches = list(islice(trainer.texts.epoch(0), STEPS))
    held_out = trainer.held_out.batches()[:1]

    def ours():
        return distill(
            trainer.model, trainer.fine, trainer.start, kept, lambda epoch: batches, held_out, steps=STEPS
        )

    plain = Plain(fine, start, kept)
    cold, _ = timed(ours)
    plain.train(batches[:8])
    seconds: dict[str, list[float]] = {"ours": [], "PyTorch": []}
    for _ in range(ROUNDS):
        seconds["ours"].append(timed(ours)[0])
        seconds["PyTorch"].append(timed(plain.train, batches)[0])
    numbers = sum(len(p.a) + len(p.b) for each in kept.values() for p in each.parts)
    tokens = int(sum(batch["input_ids"].size for batch in batches))
    return {
        "steps": STEPS, "numbers": numbers, "padded_tokens": tokens, "with_compilation": cold,
        "seconds": {name: spread(s) for name, s in seconds.items()},
    }  # fmt: skip


class Plain:
    """The same training in PyTorch: dense weights plus factors, eagerly."""

    def __init__(self, fine: Path, start: dict, kept: dict):
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.teacher = load(fine).eval()
        self.student = load(fine).eval()
        self.start = {name: torch.tensor(np.asarray(x)) for name, x in start.items()}
        self.kept = kept

    def train(self, batches: list) -> None:
        factors = {
            name: [
                torch.tensor(np.asarray(x.numbers, np.float32), requires_grad=True) for x in (part.a, part.b)
            ]
            for name, each in self.kept.items()
            for part in each.parts
        }
        optimizer = torch.optim.Adam([x for pair in factors.values() for x in pair], 1e-4)
        for batch in batches:
            inputs = {
                name: torch.tensor(batch[name], dtype=torch.int64)
                for name in ("input_ids", "attention_mask", "token_type_ids")
            }
            real = inputs["attention_mask"][..., None].float()
            with torch.no_grad():
                theirs = self.teacher(**inputs, output_hidden_states=True)
            weights = self.start | {name: self.start[name] + a @ b for name, (a, b) in factors.items()}
            ours = torch.func.functional_call(
                self.student, weights, kwargs=inputs | {"output_hidden_states": True}
            )
            a, b = theirs.hidden_states[-1] * real, ours.hidden_states[-1] * real
            loss = (((a - b) ** 2).sum((1, 2)) / (a**2).sum((1, 2))).mean()
            if ours.logits.shape[-1] == 1:
                loss = loss + ((theirs.logits - ours.logits) ** 2).mean()
            else:
                known, guessed = theirs.logits.log_softmax(-1), ours.logits.log_softmax(-1)
                loss = loss + (known.exp() * (known - guessed)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--also", action="append", default=[], metavar="TASK=FINE")
    options = begun(parser)
    fines = {options.task: options.fine} | {
        task: Path(fine) for task, _, fine in (x.partition("=") for x in options.also)
    }
    source = Source(task=options.task, data_dir=options.data_dir, limit=10_000)
    results = {
        "task": options.task,
        "bytes_per_parameter": AT,
        "commands": {
            task: command(options.base, fine, replace(source, task=task)) for task, fine in fines.items()
        },
        "steps": steps(options.base, options.fine, source),
    }
    report(results, options.json)


if __name__ == "__main__":
    main()
