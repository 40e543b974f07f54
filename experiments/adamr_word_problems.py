"""AdamW against AdamR on a small Llama: the same budget each, then DARE and DAREx-q on each delta.

    python experiments/word_problems.py          # leaves the base: a Llama that knows problems of one sum
    python experiments/adamr_word_problems.py    # teaches it problems of up to two

The base is what the first script fine-tuned. Each finished optimizer leaves its JSON file under
`results/adamr_word_problems/` and is not run again; a training under way goes on from its last checkpoint.
Scores are of 500 test problems: the share of solutions that greedy decoding writes to the last token.
"""

import argparse
import json
import textwrap
import time
from pathlib import Path

import jax
from adamr_common import DROP_RATES, HEADINGS, authors_search, machine, optimizers, scored_row, table_rows

import darex_jax as dx
from darex_jax.choosing.pair import Pair, split_in_scope
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.objectives import answer_objective, output_objective
from darex_jax.files.checkpoint import save_params
from darex_jax.files.manifest import params_digest
from darex_jax.tasks.answers import answer_batches, encode_problems
from darex_jax.tasks.batching import load_tokenizer
from darex_jax.tasks.word_problems import word_problems
from darex_jax.training.causal_lm import answer_scores, train_answers
from darex_jax.training.checkpoints import Checkpoints
from darex_jax.training.loop import Recipe, delta_size

RESULTS = Path(__file__).parent / "results" / "adamr_word_problems"
STEPS, RATE = 1000, 1e-3
OPTIMIZERS = optimizers(l1="0.0001")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/word_problems/fine-tuned"))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--runs", type=Path, default=Path("runs/adamr_word_problems"))
    parser.add_argument("--train-only", action="store_true", help="leave the fine-tuned models, no result")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.optimizers:
        file = RESULTS / f"{name}.json"
        if options.train_only:
            fine_tuned(name, options.base, options.runs / name)
        elif not file.exists():
            results = run(name, options.base, options.runs / name)
            file.write_text(json.dumps(results, indent=2) + "\n")
            write_table()


def fine_tuned(name: str, base_path: Path, runs: Path) -> Path:
    """The directory of the fine-tuned model, trained if it is not there; goes on after a stop."""
    out = runs / "fine-tuned"
    if (out / "config.json").exists():
        return out
    model, base = dx.load_model(base_path)
    fine, _ = train_answers(
        model,
        base,
        encode_problems(load_tokenizer(base_path), word_problems(seed=1, max_steps=2).train),
        recipe(name),
        key=jax.random.key(1),
        pretrained=base,
        checkpoints=Checkpoints(runs, every=200, keep=1),
        on_step=lambda r: say(name, f"step {r.step} loss {r.loss:.4f}") if r.step % 100 == 0 else None,
    )
    save_params(out, fine, model.config.to_hf(), companions_from=base_path)
    return out


def recipe(name: str) -> Recipe:
    return Recipe(learning_rate=RATE, steps=STEPS, **OPTIMIZERS[name])


def say(name: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


def run(name: str, base_path: Path, runs: Path) -> dict[str, object]:
    model, base = dx.load_model(base_path)
    _, fine = dx.load_model(fine_tuned(name, base_path, runs))
    tokenizer = load_tokenizer(base_path)
    problems = word_problems(seed=1, max_steps=2)

    def batches(some):
        return list(answer_batches(encode_problems(tokenizer, some), 50, 0, 0))

    held_out, test = batches(problems.validation[:200]), batches(problems.test)
    calibration = batches(problems.train[:50])

    def score(params) -> float:
        return answer_scores(model, params, test).answers

    rms, largest = map(float, delta_size(fine, base))
    results = {
        "optimizer": name, "recipe": OPTIMIZERS[name], "steps": STEPS, "learning_rate": RATE,
        "batch_size": recipe(name).batch_size, "test_problems": len(problems.test),
        "base": score(base), "fine_tuned": score(fine), "delta_rms": rms, "delta_max": largest,
        "digest": params_digest(fine), "rates": [], **machine(),
    }  # fmt: skip
    say(name, f"base {results['base']:.3f}, fine-tuned {results['fine_tuned']:.3f}, delta rms {rms:.3e}")
    scope = choose_scope("llama")
    in_scope = {n: x for n, x in flatten_names(base).items() if scope(n)}
    start, delta = split_in_scope(fine, unflatten_names(in_scope))
    by_labels, by_outputs = answer_objective(model, held_out), output_objective(model, fine, calibration)
    for drop_rate in DROP_RATES:
        pair = Pair(model, fine, start, delta, drop_rate)
        q_v = authors_search(by_labels, pair, pair.models[:1])
        q_e = authors_search(by_outputs, pair, pair.models)
        row = scored_row(pair, q_v.q, q_e.q, score)
        results["rates"].append(row)
        say(name, ", ".join(f"{m} {row[m]['mean']:.3f}" for m in ("dare", "q_v", "q_e")) + f" at {drop_rate}")
    return results


def write_table() -> None:
    found = [RESULTS / f"{name}.json" for name in OPTIMIZERS]
    results = [json.loads(file.read_text()) for file in found if file.exists()]
    first = results[0]
    text = (
        "The base, a Llama of 0.8 M parameters, was taught problems of one sum; here it learns those of up "
        f"to two: {first['steps']} steps of {first['batch_size']}, learning rate {first['learning_rate']:g}, "
        f"the same for all. Scores are the share of {first['test_problems']} test solutions that greedy "
        f"decoding writes to the last token (the base: {first['base']:.3f}), mean ± standard deviation over "
        "four masks (seeds 0-3). `mlp` and `self_attn` are pruned. q by labels is searched on the share of "
        "right tokens of 200 validation solutions with one mask, q by outputs on 50 training problems with "
        "four. A row is made by `python experiments/adamr_word_problems.py --optimizers OPTIMIZER`; machine, "
        "versions and recipes stand in the JSON files under `adamr_word_problems/`. `gain kept`: of what the "
        "fine-tuned model gains over the base, what DARE keeps, and what the better q keeps."
    )
    lines = [
        "# AdamW and AdamR on word problems with a small Llama, then DARE and DAREx-q",
        "",
        *textwrap.wrap(text, 108),
        "",
        *HEADINGS,
        *table_rows(results, "base"),
    ]
    (RESULTS.parent / "adamr_word_problems.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
