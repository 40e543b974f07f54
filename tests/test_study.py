"""Declared studies: rows that resume, fine-tunes that are trained once, tables, claims, and the command."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from test_tasks import write_glue

from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.methods.budget import TooSmall
from darex_jax.methods.evidence import Evidence
from darex_jax.study import of_results
from darex_jax.study import run as running
from darex_jax.study.claims import findings
from darex_jax.study.fine_tunes import Place, obtain
from darex_jax.study.measures.tested import open_tested, spread
from darex_jax.study.of_results import results_page
from darex_jax.study.plan import chosen, read_plan
from darex_jax.study.rows import cell_of, digest_of, read_rows, seconds_left, write_rows
from darex_jax.study.run import current_rows, groups, known_rows, missing_cells, run_study
from darex_jax.study.tables import best_of, figures, section, tables
from darex_jax.study.written import markdown, write_section
from darex_jax.tasks.gsm8k import gsm8k_prompt
from darex_jax.tasks.word_problems import word_problems

FINE_TUNES = """
[small.models.tiny]
[small.models.llama]
[small.train]
lora = { model = "llama", task = "word-problems", steps = 2, learning_rate = 1e-2, limit = 16, lora_rank = 2 }
one = { model = "tiny", task = "opinions", steps = 3, learning_rate = 1e-3, limit = 40 }
two = { model = "tiny", task = "opinions", steps = 2, learning_rate = 1e-3, limit = 40 }
words = { model = "llama", task = "word-problems", steps = 2, learning_rate = 1e-2, limit = 16 }
[small.optimizers]
adamw = { optimizer = "adamw", batch_size = 8, validation_limit = 8 }
adamr = { optimizer = "adamr", weight_decay = 0.1, batch_size = 8, validation_limit = 8 }
"""
METHODS = """
title = "Tiny"
measure = "methods"
source = "a table"
text = "What is shown."
[[claims]]
claim = "SVD beats DARE"
better = "SVD"
than = "DARE"
at = [0.5]
[small]
train = ["one"]
drop_rates = [0.5, 0.9]
masks = 2
test_examples = 16
[small.ways]
DARE = { method = "dare" }
SVD = { method = "svd" }
"""
NO_WAYS = METHODS.split("[[claims]]")[0] + METHODS[METHODS.index("[small]") : METHODS.index("DARE = {")]
Q = """
title = "Ways to choose q"
measure = "q"
[small]
train = ["one"]
optimizers = ["adamr"]
drop_rates = [0.9]
masks = 2
test_examples = 16
[small.ways]
DARE = {}
two-point = { objective = "two-point", limit = 4 }
labels = { objective = "labels", limit = 8, walk = true }
"""
DELTAS = """
title = "Deltas"
measure = "delta"
[small]
train = ["one"]
masks = 2
[small.ways]
statistics = {}
bound = { at = [0.5] }
"""
MERGING = """
title = "Merged"
measure = "merging"
[small]
train = ["one", "two"]
sets = [["one", "two"]]
masks = 2
test_examples = 16
[small.ways]
sum = { method = "linear" }
dare = { method = "dare-ties", drop_rate = 0.5, q = "two-point" }
"""

RIVALS = """
title = "Rivals"
measure = "methods"
[small]
train = ["one"]
bytes = [0.34, 0.24, 0.05]
test_examples = 16
[small.ways]
LoRA = { method = "labels", support = "lora", at = [0.34, 0.05] }
"LoRA, 4 bits" = { method = "labels", support = "lora", bits = 4, at = [0.34] }
random = { method = "labels", support = "random", at = [0.34, 0.24] }
"""


LORA = """
title = "A LoRA"
measure = "lora"
[small]
train = ["lora"]
drop_rates = [0.5]
masks = 2
test_examples = 4
[small.ways]
merged = { pruned = "merged" }
factors = { pruned = "factors" }
"""


@pytest.fixture
def studies(tmp_path):
    files = {"lora": LORA} | {
        "fine_tunes": FINE_TUNES, "tiny": METHODS, "q": Q, "deltas": DELTAS, "merged": MERGING,
        "rivals": RIVALS,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def place(folders, tmp_path_factory):
    """Fine-tuned models are trained once for all tests here."""
    place = tmp_path_factory.mktemp("study")
    (place / "models").mkdir()
    (place / "models" / "tiny").symlink_to(folders / "bert" / "base")
    (place / "models" / "llama").symlink_to(folders / "llama" / "base")
    return Place(place / "runs", place / "models")


def darex(*arguments, fails=False):
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_a_study_resumes_and_measures_nothing_twice(studies, place, monkeypatch):
    plan = read_plan(studies, "tiny", "small")
    seen = []

    def stopped(progress):
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(plan, place, on_row=stopped)
    assert [(p.done, p.total) for p in seen] == [(1, 5), (2, 5)] and seen[1].left > 0
    assert [cell_of(row) for row in read_rows(plan.file)] == [cell_of(p.row) for p in seen]
    trained = [path.stat().st_mtime_ns for path in place.runs.glob("one-adamw-0-*/fine-tuned/config.json")]
    rows = run_study(plan, place, on_row=seen.append)
    assert len(seen) == 5 and rows == read_rows(plan.file)
    cells = [cell_of(row)[1:] for row in rows]
    assert cells == [("fine-tuned", None), ("DARE", 0.9), ("DARE", 0.5), ("SVD", 0.9), ("SVD", 0.5)]
    assert [
        path.stat().st_mtime_ns for path in place.runs.glob("one-adamw-0-*/fine-tuned/config.json")
    ] == trained
    assert len(rows[1]["metrics"]) == 2 and len(rows[3]["metrics"]) == 1  # masks, and no mask
    monkeypatch.setattr("darex_jax.study.measures.methods.obtain", lambda *_: pytest.fail("a model was read"))
    assert run_study(plan, place) == rows  # nothing is missing: no model is looked at


def test_another_setting_is_measured_again_and_only_that(studies, place):
    plan = read_plan(studies, "tiny", "small")
    before = run_study(plan, place)
    text = METHODS.replace('"svd" }', '"svd", bits = 4 }')
    (studies / "tiny.toml").write_text(text)
    changed, measured = read_plan(studies, "tiny", "small"), []
    rows = run_study(changed, place, on_row=lambda progress: measured.append(cell_of(progress.row)))
    assert [cell[1:] for cell in measured] == [("SVD", 0.5), ("SVD", 0.9)]
    assert len(rows) == len(before) and [r for r in rows if r["way"] != "SVD"] == [
        r for r in before if r["way"] != "SVD"
    ]


def test_rows_of_other_weights_are_replaced(studies, place):
    plan, lines = read_plan(studies, "tiny", "small"), []
    rows = run_study(plan, place)
    write_rows(plan.file, [row | {"weights": "another"} for row in rows if row["way"] != "DARE"])
    again = run_study(plan, place._replace(say=lines.append))
    assert [(r["way"], r["at"], r["mean"]) for r in again] == [(r["way"], r["at"], r["mean"]) for r in rows]
    assert {r["weights"] for r in again} == {r["weights"] for r in rows}
    assert any("3 rows are of other weights" in line for line in lines)


def test_rows_of_another_study_are_taken_over(studies, place):
    run_study(read_plan(studies, "tiny", "small"), place)
    text = METHODS.replace('SVD = { method = "svd" }', "").replace('"SVD"', '"DARE"')
    (studies / "part.toml").write_text(text)
    part = read_plan(studies, "part", "small")
    assert len(known_rows(part)) == 3 and missing_cells(part, known_rows(part)) == []


def test_rows_of_other_weights_are_not_taken_over(studies, place):
    """Two studies with rows of one fine-tune on different machines: their rows are not mixed."""
    rows = run_study(read_plan(studies, "tiny", "small"), place)
    plan = read_plan(studies, "tiny", "small")
    (studies / "part.toml").write_text(METHODS)
    part = read_plan(studies, "part", "small")
    write_rows(part.file, [row | {"weights": "another"} for row in rows[:2]])
    write_rows(plan.file, rows)
    assert {row["weights"] for row in known_rows(part)} == {"another"} and len(known_rows(part)) == 2


def test_a_changed_model_is_another_declaration(studies, place):
    run_study(read_plan(studies, "tiny", "small"), place)
    changed = FINE_TUNES.replace(
        "[small.models.tiny]", '[small.models.tiny]\nconfig = { model_type = "bert" }'
    )
    (studies / "fine_tunes.toml").write_text(changed)
    plan = read_plan(studies, "tiny", "small")
    assert (
        len(missing_cells(plan, known_rows(plan))[0][1]) == 5 and current_rows(plan, known_rows(plan)) == []
    )
    shown = section(plan, known_rows(plan), "darex experiment tiny")
    assert "Not measured yet: 5 of 5 rows." in shown.text


def test_the_best_is_compared_on_shared_fine_tunes():
    full = {"a": 0.9, "b": 0.5, "c": 0.7}
    assert best_of({"x": full, "y": {"a": 0.95, "b": 0.4}}) == {"x"}  # on a and b: 0.7 against 0.675
    assert best_of({"x": full, "y": {"b": 0.99}}) == set()  # too few to compete, and x alone is no contest
    assert best_of({"x": {"a": 0.5}, "y": {"a": 0.5}}) == {"x", "y"}


def test_every_measure(studies, place):
    q = run_study(read_plan(studies, "q", "small"), place)
    assert [row["way"] for row in q] == ["fine-tuned", "DARE", "two-point", "labels"]
    assert q[1]["q"] == pytest.approx(0.1) and len(q[2]["metrics"]) == 2 and q[3]["labels"] == 8
    _, statistics, bound = run_study(read_plan(studies, "deltas", "small"), place)
    assert 0 < statistics["rms"] <= statistics["largest"] and statistics["stable_rank"] >= 1
    assert 0.9 < bound["within"] <= 1 and 0 < bound["error_to_bound"] < bound["largest_to_bound"]
    alone, total, dare = run_study(read_plan(studies, "merged", "small"), place)
    assert set(alone["metrics"]) == {"one", "two"} and alone["mean"] == 1.0
    assert len(total["metrics"]["one"]) == 1 and len(dare["metrics"]["two"]) == 2 and len(dare["q"]) == 2
    fine, merged, factors = run_study(read_plan(studies, "lora", "small"), place)
    assert fine["change"] == 0 < merged["change"] and fine["loss_without"] != fine["loss"]
    assert 0 < factors["change"] != merged["change"] and merged["loss_std"] >= 0
    for name in ("q", "deltas", "merged", "lora"):
        plan = read_plan(studies, name, "small")
        text = markdown(section(plan, read_rows(plan.file), "darex experiment"))
        assert text.count("\n| ") >= len(plan.ways)


def test_rivals_are_trained_with_labels(studies, place, monkeypatch):
    """LoRA once for all bits, a subspace for every size; files have the bytes that they may have."""
    from darex_jax.study.measures import labels

    trained = []
    once = labels._Start._trained
    monkeypatch.setattr(labels._Start, "_trained", lambda *given: trained.append(1) or once(*given))
    _, lora, none, rounded, *random = run_study(read_plan(studies, "rivals", "small"), place)
    assert len(trained) == 3 and [row["at"] for row in random] == [0.34, 0.24]
    assert "bytes, " in none["why"] and "are allowed" in none["why"] and "mean" not in none
    assert rounded["file_bytes"] < lora["file_bytes"] and 0 <= lora["agreement"] <= 1
    sizes = [found["file_bytes"] / found["at"] for found in random]
    assert max(sizes) < 1.25 * min(sizes) and lora["file_bytes"] / lora["at"] < max(sizes)
    (studies / "rivals.toml").write_text(RIVALS.replace('"lora", at', '"lore", at'))
    with pytest.raises(DarexError, match=r'labels has support = "lora" or "random"'):
        run_study(read_plan(studies, "rivals", "small"), place)


def test_texts_may_be_of_another_task(studies, place, tmp_path, monkeypatch):
    """Statistics are taken on them, the metric stays that of the fine-tune's own task."""
    from darex_jax.study.measures import methods

    write_glue(tmp_path / "cola", "cola")
    seen = []
    gather = methods.gather
    monkeypatch.setattr(
        methods, "gather", lambda *given, **more: seen.append(given[2]) or gather(*given, **more)
    )
    ways = 'own = { method = "wanda" }\nother = { method = "wanda", texts = "cola" }\n'
    (studies / "tiny.toml").write_text(NO_WAYS + ways)
    plan = read_plan(studies, "tiny", "small")
    fine, *rows = run_study(plan, place._replace(data_dir=tmp_path))
    assert [source.task for source in seen] == ["opinions", "cola"]
    assert fine["metric_name"] == "accuracy" and len(rows) == 4 and all("mean" in row for row in rows)


def test_a_decoder_may_write_the_texts_itself(studies, place, monkeypatch):
    from darex_jax.study.measures import methods

    prompts, texts = [], []

    def sample(*model, **options):
        prompts.append(options["prompts"])
        texts.append(written(*model, **options))
        return texts[-1]

    def gather(base, fine, source, *needs, **more):
        lines = Path(source.table.data).read_text().split("\n")[:-1]
        assert [json.loads(line)["text"] for line in lines] == texts[-1]
        return known(base, fine, source, *needs, **more)

    known, written = methods.gather, methods.sample_texts
    for name, value in (("gather", gather), ("sample_texts", sample), ("SAMPLES", 12), ("LONGEST", 4)):
        monkeypatch.setattr(methods, name, value)
    (studies / "tiny.toml").write_text(
        NO_WAYS.replace('["one"]', '["words"]') + 'own = { method = "wanda", texts = "sampled" }\n'
    )
    _, *rows = run_study(read_plan(studies, "tiny", "small"), place)
    assert prompts == [[gsm8k_prompt(problem.question) for problem in word_problems(0, 3).train]]
    assert len(set(texts[0])) == 12 and len(rows) == 2 and all("mean" in row for row in rows)


def test_a_way_may_prune_other_parameters_and_train_for_other_steps(studies, place, monkeypatch):
    """A decoder has an agreement of next tokens; its embeddings are pruned where a way says so."""
    from darex_jax.study.measures import methods

    pruned, looked, chosen = [], [], []
    prune_by = methods.prune_by

    def seen(job, *given, **more):
        pruned.append(job.scope("model.embed_tokens.weight"))
        return prune_by(job, *given, **more)

    def gather(*given, steps, scope):
        looked.append(scope("model.embed_tokens.weight"))
        if steps == 3:
            raise TooSmall("to train in seconds")
        return Evidence(), {}

    monkeypatch.setattr(methods, "prune_by", seen)

    def choose_q(base, fine, drop_rate, choice, source):
        chosen.append(choice.include)
        return {"q": 0.5}

    monkeypatch.setattr(methods, "gather", gather)
    monkeypatch.setattr(methods, "choose_q", choose_q)
    ways = 'own = { method = "svd", at = [0.5] }\nall = { method = "svd", include = ["."], at = [0.5] }\n'
    ways += 'q = { method = "dare", q = "two-point", include = ["."], at = [0.5] }\n'
    ways += 'short = { method = "distilled", steps = 3, at = [0.9] }\n'
    (studies / "tiny.toml").write_text(NO_WAYS.replace('["one"]', '["words"]') + ways)
    plan = read_plan(studies, "tiny", "small")
    fine, own, every, q, short = run_study(plan, place)
    assert pruned[:2] == [False, True] and all(pruned[2:]) and short["why"] == "to train in seconds"
    assert looked == [False, True, False] and chosen == [(".",)] and q["q"] == 0.5
    assert fine["agreement"] == 1.0 and 0 <= fine["no_delta"] <= 1 and own["file_bytes"] > every["file_bytes"]
    assert all(0 <= row["agreement"] <= 1 for row in (own, every))
    (fine_tune,) = plan.fine_tunes
    tested = open_tested(fine_tune, obtain(fine_tune, place)[1], place, 4)
    broken = tested.values(tested.model, jax.tree.map(lambda x: x * jnp.nan, tested.params))
    assert broken == {"metric": 0.0, "tokens": 0.0, "agreement": 0.0}  # a row can hold these
    assert "loss" not in spread([tested.values(tested.model, tested.params), broken])


def test_a_list_that_is_read_in_part_ends_quietly():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "darex_jax", "experiment"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() == 1


def test_scattered_values_train_as_a_dense_delta_at_their_places():
    from darex_jax.study.measures.labels import Scattered

    def model(params, x):
        return x @ params["layer"]["weight"].T

    weight, x = jnp.arange(6.0).reshape(2, 3), jnp.ones((1, 3))
    scattered = Scattered(model, {"layer.weight": np.array([1, 5], np.uint32)}, rate=10.0)

    def total(values):
        return scattered({"layer": {"weight": weight}, "values": {"layer": {"weight": values}}}, x).sum()

    values = jnp.array([0.5, -0.25])
    assert float(total(values)) == pytest.approx(float(weight.sum()) + 10 * 0.25)
    np.testing.assert_allclose(jax.grad(total)(values), [10.0, 10.0])


def test_tables_figures_and_the_page(studies, place, tmp_path):
    plan = read_plan(studies, "tiny", "small")
    rows = run_study(plan, place)
    table, seconds = tables(plan, [{**row, "seconds": 2.0 + i} for i, row in enumerate(rows)])
    assert seconds.title == "Seconds" and seconds.rows == [["DARE", "4", "3"], ["SVD", "6", "5"]]
    assert table.columns == ["", "0.5", "0.9"] and [row[0] for row in table.rows] == ["DARE", "SVD"]
    assert "±" in table.rows[0][1] and "±" not in table.rows[1][1] and "16 examples" in table.note
    (figure,) = figures(plan, rows)
    assert [series.name for series in figure.series] == ["DARE", "SVD"]
    assert figure.series[0].x == pytest.approx((0.1, 0.5))
    written = write_section(section(plan, rows, "darex experiment tiny"), tmp_path / "out")
    assert [path.suffix for path in written] == [".md", ".png", ".svg"]
    assert written[1].read_bytes()[:4] == b"\x89PNG" and b"<svg" in written[2].read_bytes()[:600]
    drawn = written[2].read_text()  # two lines with deviations, there and in the legend
    assert "<!-- one, adamw -->" in drawn and drawn.count('id="LineCollection') == 4
    page = results_page(studies / "results")
    assert page.sections[0].findings[0].claim == "SVD beats DARE" and page.facts
    with pytest.raises(DarexError, match="has no rows of a study"):
        results_page(tmp_path / "elsewhere" / "results")


def row(fine_tune, way, at, mean):
    return {"fine_tune": fine_tune, "way": way, "at": at, "mean": mean, "made": "", "weights": ""}


def test_verdicts_follow_from_the_rows(studies):
    plan = read_plan(studies, "tiny", "small")

    def verdict(claim, *values, constant=None):
        rows = [row(f"{task}/{optimizer}/0", way, at, mean) for task, optimizer, way, at, mean in values]
        names = {each["fine_tune"] for each in rows}
        rows += [row(name, "fine-tuned", None, 0.8) | {"constant": constant} for name in names]
        object.__setattr__(plan, "claims", [{"claim": "it is so", **claim}])
        (finding,) = findings(plan, rows)
        return finding.verdict, finding.figures

    both = {"better": "SVD", "than": "DARE", "at": [0.5]}
    a = [("one", "adamw", "SVD", 0.5, 0.7), ("one", "adamw", "DARE", 0.5, 0.6)]
    b = [("two", "adamw", "SVD", 0.5, 0.5), ("two", "adamw", "DARE", 0.5, 0.5)]
    assert verdict(both, *a) == ("held", "1 of 1: one, adamw at 0.5: 0.7 against 0.6.")
    assert verdict(both, *a, *b)[0] == "held partly"
    assert verdict(both, *b)[0] == "not seen"  # as good is not better
    assert verdict(both | {"at": [0.9]}, *a) == ("not testable here", "not measured yet.")
    kept = {"keeps": 0.85, "way": "SVD", "at": [0.5]}
    assert verdict(kept, *a) == ("held", "1 of 1: one, adamw at 0.5: 87.5%.")
    assert verdict(kept | {"keeps": 0.9}, *a)[0] == "not seen"
    other = ("one", "adamr", "DARE", 0.5, 0.65)
    assert verdict({"better": "adamr", "than": "adamw", "way": "DARE", "at": [0.5]}, *a, other)[0] == "held"
    assert verdict(both | {"optimizers": ["adamr"]}, *a)[0] == "not testable here"
    floor = [("one", "adamw", "SVD", 0.5, 0.3), ("one", "adamw", "DARE", 0.5, 0.0)]
    assert verdict(both, *floor, constant=0.4)[0] == "not seen"  # better, but less than nothing learnt
    assert "not above nothing learnt" in verdict(both, *floor, constant=0.4)[1]
    gain = {"keeps_gain": 0.5, "way": "SVD", "at": [0.5]}
    assert verdict(gain, *a, constant=0.59)[0] == "held" and verdict(gain, *a, constant=0.65)[0] == "not seen"
    assert "no better than nothing learnt" in verdict(gain, *a, constant=0.8)[1]
    assert verdict({"untestable": "no such machine"}, *a) == ("not testable here", "no such machine")
    assert verdict({"way": "SVD", "value": "mean", "least": 0.71, "at": [0.5]}, *a)[0] == "not seen"


def test_the_estimate_is_of_rows_like_the_missing_ones():
    rows = [{**row("a", "slow", 0.5, 1.0), "seconds": 10}, {**row("a", "quick", 0.5, 1.0), "seconds": 1}]
    assert seconds_left([("b", "slow", 0.5), ("b", "quick", 0.9)], rows) == 11
    assert seconds_left([("b", "unknown", 0.5)], rows) == 5.5
    assert seconds_left([("b", "slow", 0.5)], []) is None
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 3})


def test_the_command(studies, place):
    where = ("--folder", studies, "--runs", place.runs, "--models", place.models)
    assert "5 missing" in darex("experiment", *where)
    assert "unknown, nothing like it" in darex("experiment", "tiny", *where, "--dry-run")
    assert "there is no such study; in" in darex("experiment", "none", *where, fails=True)
    assert "has no rows yet" in darex("experiment", "tiny", *where, "--table", fails=True)
    assert "matches no way and no fine-tune" in darex("experiment", "tiny", *where, "--only", "x", fails=True)
    only = darex("experiment", "tiny", *where, "--only", "DARE")
    assert "DARE" in only and "Written: " in only and (studies / "results/small/tiny.md").exists()
    left = json.loads(darex("experiment", "tiny", *where, "--dry-run", "--json"))
    assert [cell[1] for cell in left["missing"]] == ["SVD", "SVD"] and left["seconds"] > 0
    assert len(json.loads(darex("experiment", "tiny", *where, "--json"))["rows"]) == 5


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('measure = "methods"', 'measure = "guesses"', "measure is one of methods, q, delta, merging, lora"),
        ('train = ["one"]', 'train = ["three"]', "declares no small.train.three; it has lora, one, two"),
        ("masks = 2", "mask = 2", "unknown mask in \\[small\\]"),
        ('title = "Tiny"', "title = Tiny", "is not TOML"),
        ("drop_rates = [0.5, 0.9]", "drop_rates = [0.5]\nbytes = [0.1]", "drop_rates or bytes, not both"),
        ("[small]", "[paper]", "has no scale \\[small\\]; it has paper"),
        ('than = "DARE"', 'then = "DARE"', "unknown then in a claim"),
        ('than = "DARE"', 'than = "DAER"', "a claim names 'DAER'; the ways are DARE, SVD"),
        ('than = "DARE"', "", "a claim has a text"),
        ("[0.5, 0.9]", "0.5", "drop_rates is a list"),
        ('train = ["one"]', 'train = "one"', "train is a list"),
        ("masks = 2", "masks = 0", "masks is a positive integer"),
        ('{ method = "svd" }', '"svd"', "ways is a table"),
        ('{ method = "svd" }', '{ method = "svd", at = 0.5 }', "at of 'SVD' is a list of numbers, got 0.5"),
        ('{ method = "svd" }', '{ method = "svd", at = [0.7] }', "at of 'SVD' has 0.7, which is no column"),
        ("at = [0.5]", "at = 0.5", "at of a claim is a list of numbers"),
        ("drop_rates = [0.5, 0.9]", "", "the measure methods needs bytes"),
        ('"svd"', '"svdd"', "method of 'SVD' is one of dare, .*, labels, got 'svdd'"),
        ('"svd" }', '"svd", bit = 4 }', "unknown bit in the way 'SVD'; it may have at, bits"),
        ('title = "Tiny"', 'title = "Tiny"\npaper = 3', "\\[paper\\] is not a table"),
        ('title = "Tiny"', "title = 5", "title is a text, got 5"),
        ('measure = "methods"', "measure = []", "measure is one of"),
        ('than = "DARE"', 'than = ["DARE"]', "than of a claim is a text, got \\['DARE'\\]"),
        ("masks = 2", "masks = 2\nsets = [1]", "sets is a list"),
        ("masks = 2", "masks = 2\nseeds = [true]", "seeds is a list"),
        ("masks = 2", "masks = 2\nseeds = [-1]", "seeds are 0 or more, got -1"),
        ("[0.5, 0.9]", "[0.5, 1.5]", "drop rates are at least 0 and below 1, got 1.5"),
    ],
)
def test_a_faulty_declaration_is_named(studies, old, new, told):
    text = METHODS.replace(old, new).replace(
        "[small.ways]", "[paper.ways]" if new == "[paper]" else "[small.ways]"
    )
    (studies / "tiny.toml").write_text(text)
    with pytest.raises(DarexError, match=f"tiny.toml.*{told}"):
        read_plan(studies, "tiny", "small")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("models = 5\ntrain = {}", "small.models is a table of tables"),
        ('train = {one = 5}', "small.train is a table of tables, .*'one'"),
        ('models.m = {train = "one"}\ntrain.one = {model = "m", task = "t"}\noptimizers.adamw = {}',
         "one -> one begins with itself"),
    ],
)  # fmt: skip
def test_faulty_fine_tunes_are_named(studies, content, told):
    (studies / "fine_tunes.toml").write_text(f"[small]\n{content}\n")
    with pytest.raises(DarexError, match=f"fine_tunes.toml: {told}"):
        read_plan(studies, "tiny", "small")


def test_a_set_is_chosen_by_its_name_and_a_size_that_is_not_reached_is_left_out(studies):
    plan = read_plan(studies, "merged", "small")
    assert chosen(plan, "one+two") == [] and chosen(plan, "one") == plan.fine_tunes[:1]
    with pytest.raises(DarexError, match="matches no way and no fine-tune"):
        chosen(plan, "one+three")
    plan = replace(read_plan(studies, "tiny", "small"), name="frontier", at=[0.5])
    rows = [
        {"fine_tune": f"one/adamw/{seed}", "way": way, "at": at, "made": "", "weights": "", **values}
        for seed in range(3)
        for way, at, values in (
            ("fine-tuned", None, {"mean": 0.8, "constant": 0.5}),
            ("distilled", 0.5, {"mean": 0.6, "file_bytes": 4000} if seed else {"why": "too small"}),
        )
    ]
    (told,) = of_results._trained(plan, rows)
    assert "4 kB keep 75.0% (2 fine-tunes)" in told


def test_a_damaged_results_file_is_named(studies):
    plan = read_plan(studies, "tiny", "small")
    plan.file.parent.mkdir(parents=True)
    whole = {"fine_tune": "a", "way": "b", "made": "", "weights": ""}
    plan.file.write_text(json.dumps(whole) + '\n{"fine')
    with pytest.raises(DarexError, match=r"tiny.jsonl: line 2 is not a row of a study"):
        known_rows(plan)


def test_one_process_runs_a_study(studies, place):
    plan = read_plan(studies, "tiny", "small")
    plan.file.parent.mkdir(parents=True)
    with (
        running.only_one(plan.file.with_suffix(".lock"), "taken"),
        pytest.raises(DarexError, match="wait for it"),
    ):
        run_study(plan, place)


def test_every_declared_study_reads():
    """The studies of this repository, at each scale they have; what small rows there are belong to them."""
    folder = Path(__file__).parent.parent / "experiments"
    for path in folder.glob("*.toml"):
        if path.stem == "fine_tunes":
            continue
        for scale in ("small", "paper"):
            if f"[{scale}]" in path.read_text():
                plan = read_plan(folder, path.stem, scale)
                assert groups(plan) and plan.ways
                known = {cell for group in groups(plan) for cell in running.cells(plan, group)}
                for found in read_rows(plan.file):
                    assert found["way"] == "fine-tuned" or cell_of(found) in known, (path, cell_of(found))


def test_the_study_that_the_page_declares_reads(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "study.md").read_text()
    fine_tunes, mine = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "fine_tunes.toml").write_text(fine_tunes)
    (tmp_path / "mine.toml").write_text(mine)
    plan = read_plan(tmp_path, "mine", "small")
    assert len(groups(plan)) == 4 and sum(len(lacks) for _, lacks in missing_cells(plan, [])) == 24
    assert findings(plan, [])[0].verdict == "not testable here"


@pytest.mark.parametrize("memory", ["enough", "none"])
def test_the_first_step_is_computed_or_compiled(studies, monkeypatch, memory):
    from darex_jax.study import first_step

    bert = (
        '{ model_type = "bert", architectures = ["BertModel"], vocab_size = 64, hidden_size = 16, '
        'num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 32, hidden_act = "gelu", '
        "max_position_embeddings = 128, type_vocab_size = 2, layer_norm_eps = 1e-12, "
        "initializer_range = 0.02, hidden_dropout_prob = 0.1, attention_probs_dropout_prob = 0.1 }"
    )
    declared = FINE_TUNES.replace("[small.models.tiny]", f"[small.models.tiny]\nconfig = {bert}")
    (studies / "fine_tunes.toml").write_text(declared)
    if memory == "none":
        monkeypatch.setattr(first_step, "BYTES", 10**12)
    where = ("--folder", studies)
    (found,) = json.loads(darex("experiment", "tiny", *where, "--first-step", "--json"))
    assert found["parameters"] > 3000 and found["batch"] == "8 x 128"
    if memory == "enough":
        assert found["how"] == "computed" and found["loss"] == pytest.approx(0.69, abs=0.1)
    else:
        assert found["how"] == "compiled" and found["program_bytes"] > 4 * found["parameters"]
