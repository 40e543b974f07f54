"""Methods of pruning at equal bytes of the whole file or at equal drop rates: the restored model's metric."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.core.scope import choose_scope
from darex_jax.evaluation.text import sample_texts
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.model import load_model
from darex_jax.files.prune import Job, PruneSummary
from darex_jax.methods.budget import Budget, TooSmall
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.table import METHODS
from darex_jax.runs.blockwise import prune_blockwise
from darex_jax.runs.evidence import gather
from darex_jax.runs.prune import prune_by, pruned_entries
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.labels import rivals
from darex_jax.study.measures.tested import CALIBRATION, about, open_tested, spread, texts_of
from darex_jax.study.plan import FineTune, Plan
from darex_jax.tasks.lines import write_texts
from darex_jax.tasks.opening import open_model
from darex_jax.tasks.source import Source, read_prompts
from darex_jax.tasks.table import Table

SAMPLES, LONGEST = 2_000, 128  # texts that a fine-tuned model writes, and tokens of each
TEXTS, STEPS = 10_000, 300  # at most so many training texts, and steps of 16, for methods that train


def begin(
    plan: Plan, fine_tunes: Sequence[FineTune], place: Place
) -> tuple[dict[str, Any], Callable[..., Any]]:
    """A way is a method of `METHODS` and its options, `q` among them an objective of `choose_q`, `block_wise`
    that layers are distilled one at a time, `texts` the task whose texts are used instead of its own, or
    "sampled" for its prompts with answers that the fine-tuned model writes, `steps` of a training other than
    `STEPS`, `include` patterns of what is pruned instead of the model's scope; or the method `labels` and
    the options of `rivals`.

    Returns: values of the row "fine-tuned"; a function from way, options and column to a row's values.
    """
    (fine_tune,) = fine_tunes
    base, fine = obtain(fine_tune, place)
    tested = open_tested(fine_tune, fine, place, plan.test_examples)
    writer = Writer(plan, fine_tune, base, fine, place)

    def measured(way: str, told: Mapping[str, Any], at: float) -> dict[str, Any]:
        with ExitStack() as stack:
            b, f = (stack.enter_context(Checkpoint(path)) for path in (base, fine))
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "delta.safetensors"
            files = writer.files(b, f, path, dict(told), at)
            try:
                first = next(files)
            except TooSmall as error:
                return {"why": str(error)}
            seen = [tested.values(*load_model(base, delta=path))]
            seen += [tested.values(*load_model(base, delta=path)) for _ in files]
        options = first.recipe.options or {}
        return {**spread(seen), "q": options.get("q"), "file_bytes": first.file_bytes}

    head = {**spread([tested.values(tested.model, tested.params)]), **about(tested)}
    if tested.constant is None:  # no constant answer to compare with
        head["no_delta"] = tested.score(load_model(base)[1])
    return head, measured


class Writer:
    """Writes the files of a way: one, or one for each mask. What methods look at is gathered once."""

    def __init__(self, plan: Plan, fine_tune: FineTune, base: Path, fine: Path, place: Place):
        self.plan, self.base, self.fine = plan, base, fine
        self.source = texts_of(fine_tune, place)
        self.rival = rivals(fine_tune, base, fine, place)
        self.sampled: Path | None = None
        self.known: dict[Any, tuple[Evidence, dict[str, str]]] = {}

    def files(
        self, base: Checkpoint, fine: Checkpoint, out: Path, told: dict[str, Any], at: float
    ) -> Iterator[PruneSummary]:
        """Writes `out` again and again, one file after each mask.

        Raises: TooSmall if no file of the way is so small.
        """
        own = ("method", "q", "block_wise", "texts")
        name, objective, block_wise, texts = (told.pop(key, None) for key in own)
        steps, include = told.pop("steps", STEPS), tuple(told.pop("include", ()))
        job = Job(base, fine, out, choose_scope(fine.config.get("model_type"), include, shapes=fine.shapes))
        source = self.texts(texts)
        by_bytes = self.plan.axis == "bytes"
        budget = round(at * pruned_entries(job)) if by_bytes else Budget(drop_rate=at)
        if name == "labels":
            yield self.rival(told, budget if isinstance(budget, int) else None, out)
            return
        method = METHODS[name]
        if block_wise:
            many = replace(source, limit=TEXTS)
            yield prune_blockwise(job, many, budget, steps=steps, **told).summary
            return
        choose = None if objective is None else partial(self.choose, source, objective, include)
        if choose is not None and not by_bytes:
            told["q"] = choose(at)
        gathered = self.evidence(job, include, source, name, told.get("support"), steps)
        write = partial(prune_by, job, name, gathered=gathered)
        first = write(budget, options=told, seed=0, choose=choose if by_bytes else None)
        yield first
        spent, q = Budget(**(first.recipe.budget or {})), (first.recipe.options or {}).get("q")
        again = told | ({} if q is None else {"q": q})
        for seed in range(1, self.plan.masks if method.random and not method.trains else 1):
            yield write(spent, options=again, seed=seed)

    def texts(self, of: str | None) -> Source:
        """Its own texts, those of another task, or "sampled": prompts, answered by the fine-tuned model."""
        if of != "sampled":
            return self.source if of is None else replace(self.source, task=of)
        if self.sampled is None:
            model, params, tokenizer, ends = open_model(self.fine)
            texts = sample_texts(
                model, params, tokenizer, SAMPLES, prompts=read_prompts(self.source), max_new_tokens=LONGEST,
                eos_token_id=ends, key=jax.random.key(0),
            )  # fmt: skip
            folder = Path(tempfile.mkdtemp())
            weakref.finalize(self, shutil.rmtree, folder)
            self.sampled = folder / "texts.jsonl"
            write_texts(self.sampled, texts)
        return Source(table=Table(data=str(self.sampled), text="text"))

    def evidence(
        self, job: Job, include: tuple[str, ...], source: Source, method: str, support: str | None, steps: int
    ) -> tuple[Evidence, dict[str, str]]:
        """Args: include: what the job's scope is made of."""
        needs = METHODS[method].needs_with(support)
        source = replace(source, limit=TEXTS if METHODS[method].trains else CALIBRATION)
        asked = include, source, needs, steps
        if asked not in self.known:
            self.known[asked] = gather(self.base, self.fine, source, needs, scope=job.scope, steps=steps)
        return self.known[asked]

    def choose(self, source: Source, objective: str, include: tuple[str, ...], drop_rate: float) -> float:
        source, choice = replace(source, limit=CALIBRATION), Choice(objective=objective, include=include)
        return float(choose_q(self.base, self.fine, drop_rate, choice, source)["q"])
