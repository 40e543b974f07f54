"""`darex prune`: prunes the delta of two checkpoints and writes an artifact.

DARE with a numeric q imports neither transformers nor flax; --q auto, and methods that use texts, run the
model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from darex_jax.choosing.table import CALIBRATION_SIZE, WAYS
from darex_jax.cli.given_q import choose_given, read_q
from darex_jax.cli.options import (
    BYTES_PER_PARAMETER,
    DATA_DIR,
    DIFFICULTY,
    EXCLUDE,
    IGNORE,
    INCLUDE,
    JSON,
    LIMIT,
    PARAMS,
    RENAME,
    SEED,
    TEXT,
    Finite,
    Ratio,
    check_data_dir,
    check_difficulty,
    given_files,
    own_examples,
    renaming,
    take_table,
    typed,
    warn_of_idle_patterns,
    with_params,
)
from darex_jax.cli.show import (
    block_bar,
    byte_bar,
    bytes_text,
    family_of,
    found_scope,
    look_bar,
    plain,
    print_table,
    q_text,
    warn,
    warned,
)
from darex_jax.cli.stores import HERE, OUT, PATH, as_given
from darex_jax.methods.table import METHODS

TRAINING_TEXTS = 10_000  # maximum for distilled
ENOUGH = 256  # minimum number of texts for which best trains


@click.command()
@click.argument("base", type=PATH)
@click.argument("fine", type=PATH)
@click.argument("out", type=OUT)
@click.option("--method", type=click.Choice(["best", *METHODS]),
              help="Default: dare with a drop rate or --q, else best: distilled with "
              f"{ENOUGH} texts or more (--text, --task or --data), with fewer dare with --q "
              "two-point, without texts dare. "
              + "; ".join(f"{name}: {method.what}" for name, method in METHODS.items()) + ".")  # fmt: skip
@click.option("--drop-rate", "-p", type=click.FloatRange(0, 1, max_open=True),
              help="Probability that an entry of the delta is dropped, or the share that is not "
              "stored. This, or a size.")  # fmt: skip
@click.option("--size", type=Ratio(), help="File size: this many times smaller than the fine-tuned model.")
@BYTES_PER_PARAMETER
@click.option("--max-loss", type=Finite(0, 1, max_open=True),
              help="Find a small file that disagrees with the fine-tuned model on at most this share of "
              "held-out texts (decoders: next tokens; scores: 1 - correlation); for distilled.")  # fmt: skip
@click.option("--loss-of", type=click.Choice(["agreement", "metric"]),
              help="What --max-loss is of: the agreement with the fine-tuned model (default), or the metric "
              "on the labels of --task or --data.")  # fmt: skip
@click.option("--bits", type=click.Choice(["16", "8", "4", "2", "1"]),
              help="Bits per value: 16 is bfloat16, fewer are integers with scales. Default: 16; 4 "
              "for allocated and distilled; the fine-tuned dtype for dare at a drop rate.")  # fmt: skip
@click.option("--q", "q", default=None, metavar="NUMBER|FILE|auto|OBJECTIVE",
              help="Divisor of random survivors, or find-q's file. Default: 1 - drop rate (DARE). auto: by "
              "the labels of --task, else by the model's predictions on --text, else DARE's; or an objective "
              "of find-q, such as closed-form, on --task, --text or generated examples.")  # fmt: skip
@click.option("--task", help="Source of examples, as in find-q: for --q auto or OBJECTIVE, and "
              "for wanda, resolved and distilled.")  # fmt: skip
@DATA_DIR
@DIFFICULTY
@TEXT
@own_examples
@LIMIT
@SEED
@INCLUDE
@EXCLUDE
@RENAME
@PARAMS
@IGNORE
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinity instead of refusing them.")
@click.option("--steps", default=600, show_default=True, type=click.IntRange(3),
              help="Training steps of distilled.")  # fmt: skip
@click.option("--support", type=click.Choice(["low-rank", "allocated", "largest", "random", "sign"]),
              help="What distilled keeps of matrices: low-rank factors (default), allocated's choice, the "
              "largest entries, random ones, whose indices are not stored, or every sign and a scale of each "
              "matrix (BitDelta, from 0.126 bytes a parameter).")  # fmt: skip
@click.option("--block-wise", is_flag=True,
              help="For distilled on a decoder: train one layer after another; memory holds one layer of "
              "both models, whatever their size.")  # fmt: skip
@click.option("--checkpoints", type=HERE, help="For distilled: folder of checkpoints to resume from.")
@JSON
def prune(
    base: Path,
    fine: Path,
    out: Path,
    method: str | None,
    drop_rate: float | None,
    size: float | None,
    bytes_per_parameter: float | None,
    max_loss: float | None,
    loss_of: str | None,
    bits: str | None,
    q: str | None,
    task: str | None,
    data_dir: Path | None,
    difficulty: int,
    text: Path | None,
    limit: int | None,
    seed: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rename: str | None,
    params: str | None,
    ignore_config_fields: tuple[str, ...],
    allow_nonfinite: bool,
    steps: int,
    support: str | None,
    block_wise: bool,
    checkpoints: Path | None,
    as_json: bool,
    **own: Any,
) -> None:
    """Prune FINE - BASE and write the delta to OUT.

    BASE and FINE are Hugging Face directories or orbax checkpoints, local or URLs; OUT is one safetensors
    file, replaced if it exists. Exactly one of --drop-rate, --size, --bytes-per-parameter and --max-loss sets
    how much is kept.
    """
    from darex_jax.choosing.choice import Choice
    from darex_jax.core.scope import choose_scope, known_family
    from darex_jax.files.checkpoint import Checkpoint
    from darex_jax.files.paths import check_output
    from darex_jax.files.prune import Job, prune_checkpoints
    from darex_jax.files.stream import keep_inputs

    check_output(out)
    keep_inputs(out, *given_files(text, own["data"], q))
    base, fine = with_params(params, base, fine)
    if sum(given is not None for given in (drop_rate, size, bytes_per_parameter, max_loss)) != 1:
        raise click.UsageError(
            "pass exactly one of --drop-rate, --size, --bytes-per-parameter and --max-loss."
        )
    if loss_of is not None and max_loss is None:
        raise click.UsageError("--loss-of says what --max-loss is of: pass that as well.")
    said = {**own, "text": text}
    table = take_table(said)
    has_texts = any(given is not None for given in (task, text, table))
    places: dict[str, Any] = {"task": task, "data_dir": data_dir, "text": said["text"], "table": table}
    places |= {"difficulty": difficulty, "seed": seed}
    why = None
    if method is None:
        method = "dare" if drop_rate is not None or q is not None else "best"
    if method == "best":
        if q is not None:
            raise click.UsageError("best chooses q itself; leave out --q, or pass --method dare.")
        from darex_jax.tasks.source import Source

        texts = Source(**places, limit=limit or TRAINING_TEXTS) if has_texts else None
        method, q, why = _best(fine, texts, max_loss is not None)
    chooses = q == "auto" or q in WAYS
    stray = {
        "--max-loss": max_loss, "--checkpoints": checkpoints, "--support": support, "--bits": bits, "--q": q,
        "--block-wise": block_wise or None, "--drop-rate": drop_rate,
        "--steps": steps if typed("steps") else None,
    }  # fmt: skip
    _refuse_stray(method, {name: value for name, value in stray.items() if value is not None}, why)
    if (has_texts or data_dir or limit) and not (chooses or METHODS[method].needs):
        raise click.UsageError(
            "--task, --data-dir, --text, --data and --limit are for --q auto or an objective of find-q, and "
            "for methods that use texts."
        )
    check_difficulty(task)
    check_data_dir(task, data_dir)
    source: Any = None
    if chooses or METHODS[method].needs:
        from darex_jax.tasks.source import Source

        enough = TRAINING_TEXTS if METHODS[method].trains else CALIBRATION_SIZE
        source = Source(**places, limit=limit if chooses else limit or enough)
        if not has_texts and not chooses:
            warn(
                f"{method} sees generated texts only: pass texts like those that the model is for "
                "(--text, --task, --data)."
            )
    choice = Choice(
        objective=q if q is not None and chooses else "auto",
        scope=WAYS[q].scopes[0] if q in WAYS else "model",
        include=include, exclude=exclude, ignore_config_fields=ignore_config_fields, seed=seed,
    )  # fmt: skip
    if rename is not None and source is not None:
        raise click.UsageError("--rename is only for methods that use no texts and run no model.")
    if method == "structured" and chooses:
        raise click.UsageError(f"--q {q} tries masks of entries, structured drops columns: pass a number.")
    if chooses and method != "dare" and drop_rate is None:
        raise click.UsageError(f"--q {q} needs a drop rate: pass --drop-rate, not a size.")
    divisor: Any = None
    q_by: str | None = None
    evidence: dict[str, str] = {}

    def choose(drop_rate: float) -> Any:
        nonlocal divisor, q_by
        divisor, q_by, seen = choose_given(base, fine, drop_rate, choice, source, as_json)
        evidence.update(seen)
        return divisor

    if chooses and drop_rate is not None:
        choose(drop_rate)
    elif q is not None and not chooses:
        divisor = read_q(q, drop_rate, base, fine, choice, as_json)
        if method == "structured" and isinstance(divisor, float) and Path(q).exists():
            warn(f"{q} was chosen with masks of entries, structured drops columns.")
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        family, fine_bytes = family_of(f, b), f.nbytes
        warn_of_idle_patterns(f.tensors, include, exclude, rename)
        scope = choose_scope(family, include, exclude, f.shapes)
        scope_text = _scope_text(family, include, exclude)
        if not (include or known_family(family)):
            _say_scope(b, f, scope, family, renaming(rename))
        with byte_bar("pruning", b.nbytes + fine_bytes, as_json) as progress:
            job = Job(b, f, out, scope, scope_text, allow_nonfinite, progress, renaming(rename))
            if method == "dare" and drop_rate is not None and bits is None:
                done = _Done(prune_checkpoints(job, key=(0, seed), drop_rate=drop_rate, q=divisor))
            else:
                from darex_jax.methods.budget import Budget
                from darex_jax.runs.prune import wanted_bytes

                budget: Any = max_loss
                if drop_rate is not None:
                    budget = Budget(drop_rate=drop_rate)
                elif max_loss is None:
                    budget = wanted_bytes(job, size, bytes_per_parameter)
                options = _options(method, bits, divisor) | ({"support": support} if support else {})
                training = {"steps": steps, "checkpoints": checkpoints} if METHODS[method].trains else {}
                done = _by_method(
                    job, method, budget, source, seed=seed, options=options, training=training,
                    ignore=ignore_config_fields, evidence=evidence,
                    choose=choose if chooses and drop_rate is None else None,
                    block_wise=block_wise, loss_of=loss_of or "agreement", quiet=as_json,
                )  # fmt: skip
    summary = done.summary
    if as_json:
        report = {"out": as_given(str(out)), "method": summary.recipe.method, "drop_rate": drop_rate}
        report |= {"seed": seed, **_figures(done, fine_bytes), "warnings": warned()}
        report |= {} if why is None else {"method_chosen_by": why}
        report |= _divisors(summary.recipe) if divisor is None else {"q": divisor}
        report |= {} if q_by is None else {"q_chosen_by": q_by}
        click.echo(json.dumps(report | _looks(done), indent=2))
        return
    print_table(str(out), _rows(done, fine_bytes, why, divisor, q_by, METHODS[method].what))


class _Done(NamedTuple):
    """A file that was written, and how its values were trained.

    Attributes: trainer: the `Trainer`, with its last evaluation; blocks: of `prune_blockwise`.
    """

    summary: Any
    trainer: Any = None
    blocks: Any = None

    @property
    def look(self) -> Any:
        """The last evaluation on held-out texts, or None."""
        return None if self.trainer is None else self.trainer.result


def _refuse_stray(method: str, given: Mapping[str, Any], why: str | None) -> None:
    """Raises: UsageError for an option that the method does not have.

    Args: given: by option, those given; why: the reason for the method, if it is not the user's choice.
    """
    reason = "" if why is None else f" It is the default because {why}; --method chooses another."
    chosen = METHODS[method]
    if "--max-loss" in given and not chosen.trains:
        raise click.UsageError(f"--max-loss needs a method that trains (distilled), not {method}.")
    for option in ("--checkpoints", "--steps"):
        if option in given and not chosen.trains:
            raise click.UsageError(f"{method} does not train; leave out {option}.{reason}")
    if "--drop-rate" in given and method in ("sign", "sign-svd"):
        raise click.UsageError(f"{method} keeps the sign of every entry: pass a size instead of --drop-rate.")
    if given.get("--support") == "sign" and "--drop-rate" in given:
        raise click.UsageError("--support sign keeps every sign: pass a size instead of --drop-rate.")
    if given.get("--support") == "sign" and "--max-loss" in given:
        raise click.UsageError("--support sign has one size: pass --size or --bytes-per-parameter.")
    if "--support" in given and not chosen.trains:
        raise click.UsageError(f"{method} has a fixed support; leave out --support.")
    if "--block-wise" in given:
        if not chosen.trains:
            raise click.UsageError(
                f"--block-wise is for distilled; {method} does not train. Say --method distilled."
            )
        allocated = given.get("--support") == "allocated"
        if allocated or "--max-loss" in given:
            stray = "--support allocated" if allocated else "--max-loss"
            raise click.UsageError(f"--block-wise never runs the whole model, which {stray} needs.")
    if "--bits" in given and not chosen.quantises:
        raise click.UsageError(f"{method} has fixed bits; leave out --bits.")
    if "--q" in given and not chosen.divides:
        raise click.UsageError(f"{method} does not use q; leave out --q.")


def _by_method(
    job: Any,
    method: str,
    budget: Any,
    source: Any,
    *,
    seed: int,
    options: Mapping[str, Any],
    training: Mapping[str, Any],
    ignore: tuple[str, ...],
    evidence: dict[str, str],
    choose: Callable[[float], Any] | None,
    block_wise: bool,
    loss_of: Any,
    quiet: bool,
) -> _Done:
    """Prunes by any method.

    Args:
      budget: a `Budget`, bytes, or a float: the largest loss.
      evidence: digests of what q was, or will be, chosen from: `choose` adds them.
    """
    from darex_jax.core.memory import keep_freed_memory
    from darex_jax.methods.evidence import Evidence
    from darex_jax.runs.evidence import gather
    from darex_jax.runs.prune import prune_by, prune_within

    if training:
        keep_freed_memory()
    if block_wise:
        from darex_jax.runs.blockwise import prune_blockwise

        with block_bar(quiet) as on_block:
            blocks = prune_blockwise(
                job, source, budget, seed=seed, ignore_config_fields=ignore, on_block=on_block,
                **training, **options,
            )  # fmt: skip
        return _Done(blocks.summary, blocks=blocks)
    seen: Any = Evidence()
    with look_bar(training.get("steps", 0), quiet) as on_look:
        if METHODS[method].needs:
            needs = METHODS[method].needs_with(options.get("support"))
            told = {**training, "on_look": on_look} if training else {}
            told |= {"with_metric": True} if loss_of == "metric" else {}
            seen, digests = gather(
                job.base.source,
                job.fine.source,
                source,
                needs,
                scope=job.scope,
                ignore_config_fields=ignore,
                **told,
            )
            evidence.update(digests)
        known: dict[str, Any] = {"gathered": (seen, evidence), "seed": seed, "options": options}
        if isinstance(budget, float):
            summary = prune_within(job, method, budget, of=loss_of, on_size=_tried(quiet, loss_of), **known)
        else:
            summary = prune_by(job, method, budget, choose=choose, **known)
    return _Done(summary, seen.train if training else None)


def _figures(done: _Done, fine_bytes: int) -> dict[str, Any]:
    summary = done.summary
    return {
        "survivors": summary.survivors,
        "pruned_entries": summary.pruned_size,
        "bytes": summary.file_bytes,
        "fine_bytes": fine_bytes,
        "bytes_per_parameter": summary.file_bytes / max(1, summary.pruned_size),
        "inexact": summary.recipe.counted,
        "nonfinite": summary.recipe.nonfinite,
        "digest": summary.recipe.digest(),
    }


def _divisors(recipe: Any) -> dict[str, Any]:
    """The q of the survivors that a file holds, one or by parameter; {} where none are divided."""
    parts = [each for block in recipe.blocks or () for each in block["parameters"].items()]
    by_name = {
        name: part["q"] for name, own in parts for part in own if part["kind"] in ("random", "columns")
    }
    by_name |= {name: entry["q"] for name, entry in recipe.parameters.items() if "q" in entry}
    values = set(by_name.values())
    return {"q": values.pop() if len(values) == 1 else by_name} if values else {}


def _looks(done: _Done) -> dict[str, Any]:
    """What was measured on held-out texts."""
    found: dict[str, Any] = {}
    if done.look is not None:
        found = {"held_out": len(done.trainer.held_out.encoded), "held_out_loss": done.look.loss}
        if (measure := done.trainer.measure) is not None:
            found |= {"agreement": done.look.agreement, "agreement_is": measure}
        if done.trainer.score is not None:
            metric = done.trainer.metric
            found |= {"metric": done.trainer.score, "metric_name": metric.name}
            found |= {"fine_metric": metric.fine, "labelled": metric.examples}
    if done.blocks is not None:
        found = {"held_out": done.blocks.held_out, "last_layer_error": done.blocks.error}
    return found


def _rows(
    done: _Done, fine_bytes: int, why: str | None, divisor: Any, q_by: str | None, what: str
) -> list[tuple[str, str]]:
    """The table that people read."""
    summary, figures, seen = done.summary, _figures(done, fine_bytes), _looks(done)
    random = summary.recipe.format == 1
    density = summary.survivors / max(1, summary.pruned_size)
    kept = f"{summary.survivors:,} of {summary.pruned_size:,} ({density:.4%})"
    rows = [("method", f"{summary.recipe.method}: {what}")]
    rows += [("because", why)] if why else []
    rows += [("survivors" if random else "stored numbers", kept)]
    if random:
        rows += [("q", q_text({name: each["q"] for name, each in summary.recipe.parameters.items()}))]
    rows += [("q chosen by", q_by)] if q_by else []
    rows += [("q", q_text(divisor))] if divisor is not None and not random else []
    if done.look is not None:
        agreed, measure = seen.get("agreement", done.look.loss), seen.get("agreement_is", "loss")
        text = f"{agreed:.4f} with the fine-tuned model, on {seen['held_out']} held-out texts"
        rows += [(measure, text)]
    if "metric" in seen:
        text = f"{seen['metric']:.4f}, fine-tuned {seen['fine_metric']:.4f}"
        rows += [(seen["metric_name"], f"{text}, on {seen['labelled']} held-out examples")]
    if done.blocks is not None:
        text = f"relative squared error {done.blocks.error:.4f} on {done.blocks.held_out} held-out texts"
        rows += [("last layer", text)]
    smaller = f"{fine_bytes / summary.file_bytes:.1f} times smaller than the fine-tuned model"
    rows += [("size", f"{bytes_text(summary.file_bytes)}, {smaller} ({bytes_text(fine_bytes)})")]
    rows += [("bytes per parameter", f"{figures['bytes_per_parameter']:.5f}")]
    if random:
        rows += [("inexact values", f"{summary.recipe.inexact:,} (rounded to the fine-tuned model's dtype)")]
    return rows


def _best(fine: Path, source: Any, measures: bool) -> tuple[str, str | None, str]:
    """The default method for the given inputs, its q, and the reason.

    Args: source: of the texts, or None; measures: whether a loss must be measured.
    """
    if source is None:
        if measures:
            raise click.UsageError("--max-loss is measured on texts: pass --text, --task or --data.")
        return "dare", None, "there are no texts (--text, --task, --data) to choose q or to train"
    from darex_jax.tasks.source import read_material

    count = len(read_material(fine, source, "train").encoded)
    if count >= ENOUGH or measures:
        return "distilled", None, f"there are {count:,} texts to train on, without labels"
    return "dare", "two-point", f"{count:,} texts choose q; {ENOUGH} or more would train the values"


def _tried(quiet: bool, what: str) -> Callable[[int, float], None]:
    def say(size: int, kept: float) -> None:
        if not quiet:
            click.echo(f"tried {bytes_text(size)}: {what} {kept:.4f}", err=True)

    return say


def _options(method: str, bits: str | None, q: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"q": q} if q is not None else {}
    if METHODS[method].quantises:
        stated = METHODS[method].bits if bits is None else int(bits)
        options |= {"bits": None if stated == 16 else stated}
    if method == "dare":
        options["dtype"] = "bfloat16"
    return options


def _say_scope(base: Any, fine: Any, scope: Any, family: str | None, rename: Any) -> None:
    """Prints what is pruned of a model of an unknown family, before any work."""
    from darex_jax.files.match import match_checkpoints

    names = match_checkpoints(base, fine, scope, rename).pruned
    share = sum(fine.tensors[name].info.size for name in names)
    total = sum(tensor.info.size for tensor in fine.tensors.values() if tensor.floating)
    click.echo(
        f"{plain(family or 'this model')} has no default scope. Pruned: {found_scope(names)}; {share:,} "
        f"of {total:,} entries. All others are kept fine-tuned; --include and --exclude change that.",
        err=True,
    )


def _scope_text(family: str | None, include: tuple[str, ...], exclude: tuple[str, ...]) -> str:
    parts = [f"include {pattern}" for pattern in include] or [f"default of {family}"]
    return ", ".join(parts + [f"exclude {pattern}" for pattern in exclude])
