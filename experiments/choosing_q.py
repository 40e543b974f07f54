"""Every way to choose q, on fine-tunes with large and with small deltas, held against each other.

    python experiments/adamr_glue.py --data-dir DIR --tasks sst2 mrpc stsb cola    # leaves the classifiers
    python experiments/word_problems.py                       # leaves the Llama that knows one sum
    python experiments/adamr_word_problems.py                 # and its fine-tunes on two
    python experiments/choosing_q.py --data-dir DIR

Each way is what `darex find-q` does with the options of `WAYS`. A fine-tune and drop rate leave
`results/choosing_q/PAIR_RATE.json`, in which every way that is done stays: a stop loses minutes. Ways of
another fine-tune do not stay: training on another kind of processor ends at other bits.
`results/choosing_q.md` is the table, `results/choosing_q.png` the metric and the output change against q.
"""

import argparse
import json
import time
from pathlib import Path

from adamr_common import machine

from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q
from darex_jax.choosing.pair import open_pair, scored
from darex_jax.evaluation.classification import predict
from darex_jax.files.manifest import params_digest
from darex_jax.runs.demo import demo_weights
from darex_jax.runs.figures import log_ticks
from darex_jax.tasks import load_task
from darex_jax.tasks.answers import answer_batches, encode_problems
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source
from darex_jax.tasks.word_problems import word_problems
from darex_jax.training.causal_lm import answer_scores

RESULTS = Path(__file__).parent / "results" / "choosing_q"
DROP_RATES = (0.99, 0.9, 0.999)
GLUE, LLAMA = "runs/adamr_glue", "runs/adamr_word_problems"
PAIRS = {  # task and folder of the fine-tune
    "sst2_adamw": ("sst2", f"{GLUE}/sst2_adamw/fine-tuned"),
    "sst2_adamr": ("sst2", f"{GLUE}/sst2_adamr-l2-0.01/fine-tuned"),
    "mrpc_adamw": ("mrpc", f"{GLUE}/mrpc_adamw/fine-tuned"),
    "mrpc_adamr": ("mrpc", f"{GLUE}/mrpc_adamr-l2-0.01/fine-tuned"),
    "stsb_adamw": ("stsb", f"{GLUE}/stsb_adamw/fine-tuned"),
    "cola_adamw": ("cola", f"{GLUE}/cola_adamw/fine-tuned"),
    "word-problems_adamw": ("word-problems", f"{LLAMA}/adamw/fine-tuned"),
}
HELD_OUT = 200  # examples for what is searched on held-out ones
LAYER = {"scope": "layer"}
WAYS = {
    "q by labels (q_v)": {"objective": "labels", "limit": HELD_OUT},
    "q by predictions": {"objective": "predictions", "limit": HELD_OUT},
    "q by outputs (q_e)": {"objective": "outputs"},
    "q in two points": {"objective": "two-point"},
    "closed form": {"objective": "closed-form"},
    "closed form, layers": {"objective": "closed-form", **LAYER},
    "layers by labels, exact": {"objective": "labels", "limit": HELD_OUT, "rule": "exact", **LAYER},
    "layers by labels, published": {"objective": "labels", "limit": HELD_OUT, "rule": "published", **LAYER},
    "layers by outputs, exact": {"objective": "outputs", "rule": "exact", **LAYER},
    "layers by outputs, published": {"objective": "outputs", "rule": "published", **LAYER},
    "layers, learned": {"objective": "learned", **LAYER},
    "layers, learned slowly": {"objective": "learned", **LAYER},  # see `ways`
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of parquet files per task")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--drop-rates", nargs="+", type=float, default=DROP_RATES)
    parser.add_argument("--llama", type=Path, default=Path("runs/word_problems/fine-tuned"))
    parser.add_argument("--table", action="store_true", help="write table and picture from what is there")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for pair in [] if options.table else options.pairs:
        for drop_rate in options.drop_rates:
            run(pair, drop_rate, options.data_dir, options.llama)
    write_table()
    plot()


def ways(drop_rate: float) -> dict[str, dict]:
    """`WAYS`, learning slowly at a tenth of the density, which at 0.9 is 1e-2, too, and no way of its own."""
    how = {way: dict(options) for way, options in WAYS.items()}
    if drop_rate > 0.9:
        how["layers, learned slowly"]["learning_rate"] = (1 - drop_rate) / 10
    else:
        del how["layers, learned slowly"]
    return how


def run(pair: str, drop_rate: float, data_dir: Path | None, llama: Path) -> None:
    task, folder = PAIRS[pair]
    base, fine_path = llama if task == "word-problems" else demo_weights(), Path(folder)
    file = RESULTS / f"{pair}_{drop_rate}.json"
    results = json.loads(file.read_text()) if file.exists() else None
    if results is not None and results["ways"].keys() >= ways(drop_rate).keys():
        return
    opened = open_pair(base, fine_path, drop_rate)
    model, fine = opened.model, opened.params
    digest = params_digest(fine)
    if results is not None and results["digest"] != digest:
        results = None
    tokenizer = load_tokenizer(fine_path)
    if task == "word-problems":
        problems = word_problems(seed=1, max_steps=2).test
        batches = list(answer_batches(encode_problems(tokenizer, problems), 50, 0, 0))
        metric, count = "answers", len(problems)

        def score(params) -> float:
            return answer_scores(model, params, batches).answers

    else:
        loaded = load_task(task, data_dir)
        test = encode(tokenizer, loaded.test.select(slice(500)))
        batches = evaluation_batches(test)
        metric, count = loaded.metric_name, len(test)

        def score(params) -> float:
            return loaded.metric(predict(model, params, batches), test.labels)

    models = opened.models

    if results is None:
        results = {
            "pair": pair, "task": task, "drop_rate": drop_rate, "metric": metric, "test_examples": count,
            "fine_tuned": score(fine), "no_delta": score(opened.start), "digest": digest, **machine(),
            "ways": {"DARE": {"q": opened.density, "evaluations": 0, "labels": 0,
                              **scored(score, models, opened.density)}},
        }  # fmt: skip
    for way, how in ways(drop_rate).items():
        if way in results["ways"]:
            continue
        begun = time.monotonic()
        source = Source(task=task, data_dir=data_dir, difficulty=2, limit=how.pop("limit", None))
        found = choose_q(base, fine_path, drop_rate, Choice(**how), source)
        seconds = time.monotonic() - begun
        del found["manifest"]
        found["seconds"] = round(seconds, 1)
        results["ways"][way] = found | scored(score, models, found["q"])
        file.write_text(json.dumps(results, indent=1) + "\n")
        mean = results["ways"][way]["mean"]
        print(
            f"{time.strftime('%H:%M:%S')} {pair} {drop_rate} {way}: {mean:.3f}, {seconds:.0f} s", flush=True
        )
        write_table()


def finished() -> list[dict]:
    files = [RESULTS / f"{pair}_{rate}.json" for pair in PAIRS for rate in sorted(DROP_RATES)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def q_cell(q) -> str:
    if not isinstance(q, dict):
        return f"{q:.4g}"
    values = sorted(q.values())
    return f"{values[0]:.3g}-{values[-1]:.3g}"


def write_table() -> None:
    lines = [
        "# Ways to choose q",
        "",
        "Mean ± standard deviation over four masks (seeds 0-3) on test examples. q by labels and by",
        f"predictions is searched on the same {HELD_OUT} held-out examples with one mask, the latter without",
        "labels; by outputs on 50 training texts with four; learned on 200 with one, at",
        "the authors' rate of 1e-2 or, slowly, at a tenth of the density. `passes` is how often the examples",
        "went through a pruned model (a backward pass counts as two). Made by",
        "`python experiments/choosing_q.py --data-dir DIR`; the curves, every layer's q, seconds, machine",
        "and versions stand in the JSON files under `choosing_q/`.",
        "",
    ]
    for r in finished():
        lines += [
            f"## {r['pair'].replace('_', ', ')}, drop rate {r['drop_rate']}: {r['metric']} on "
            f"{r['test_examples']}, fine-tuned {r['fine_tuned']:.3f}, without the delta {r['no_delta']:.3f}",
            "",
            "| way | metric | q | passes | labels |",
            "| --- | --- | --- | --- | --- |",
        ]
        for way in ("DARE", *WAYS):
            if (w := r["ways"].get(way)) is not None:
                passes = f"{w['evaluations']} x {w['examples']}" if "examples" in w else "0"
                score = f"{w['mean']:.3f} ± {w['std']:.3f}"
                lines.append(f"| {way} | {score} | {q_cell(w['q'])} | {passes} | {w['labels']} |")
        lines.append("")
    (RESULTS.parent / "choosing_q.md").write_text("\n".join(lines))


def plot() -> None:
    """The metric, the agreement with the fine-tuned model, and the output change, against q."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [r for r in finished() if {"q by labels (q_v)", "q by outputs (q_e)"} <= r["ways"].keys()]
    if not results:
        return
    pairs, rates = list(dict.fromkeys(r["pair"] for r in results)), sorted({r["drop_rate"] for r in results})
    figure = Figure(figsize=(4.3 * len(rates), 3.2 * len(pairs)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pairs), len(rates), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    lines = []
    for r in results:
        axes = grid[pairs.index(r["pair"]), rates.index(r["drop_rate"])]
        axes.set_axis_on()
        twin = axes.twinx()
        lines = []
        for way, color, label in (
            ("q by labels (q_v)", "tab:blue", "held-out metric"),
            ("q by predictions", "tab:green", "agreement with the fine-tuned model"),
            ("q by outputs (q_e)", "tab:orange", "output change (right axis)"),
        ):
            if way in r["ways"]:
                w, on = r["ways"][way], twin if "outputs" in way else axes
                lines += on.plot(
                    *zip(*w["curve"], strict=True), "o-", color=color, markersize=2.5, label=label
                )
                on.axvline(w["q"], color=color, linestyle=":")
        axes.set(title=f"{r['pair'].replace('_', ', ')}, {r['drop_rate']}", xlabel="q")
        log_ticks(axes)
        axes.grid(alpha=0.3)
    labels = [line.get_label() for line in lines]
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(RESULTS.parent / "choosing_q.png", dpi=110)


if __name__ == "__main__":
    main()
