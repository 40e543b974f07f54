"""find-q, prune --q and training methods from the command line, on tiny models with tokenizers."""

import gc
import itertools
import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.choosing.choice import Choice
from darex_jax.choosing.choose import choose_q, without_labels
from darex_jax.choosing.learned import LearnedQ, hold_out_quarter
from darex_jax.choosing.pair import load_pair, open_pair, split_in_scope
from darex_jax.choosing.table import WAYS
from darex_jax.cli import main
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.evaluation.calibration import input_statistics
from darex_jax.evaluation.objectives import output_objective
from darex_jax.evaluation.outputs import output_change, reference_outputs
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.atomic import only_one
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.prune import Job
from darex_jax.methods.budget import TooSmall
from darex_jax.methods.table import METHODS
from darex_jax.runs.evidence import gather
from darex_jax.runs.prune import fit_to_size
from darex_jax.tasks import load_task
from darex_jax.tasks.answers import encode_problems, load_problems
from darex_jax.tasks.batching import encode, evaluation_batches, load_tokenizer
from darex_jax.tasks.source import Source, read_material
from darex_jax.tasks.table import Table
from darex_jax.training.causal_lm import answer_scores


def darex(*arguments, json_too=True):
    result = CliRunner().invoke(main, [*map(str, arguments), *(["--json"] if json_too else [])])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout) if json_too else result.stdout


RUNS = [
    ("bert", "--objective", "labels", "--task", "opinions", "--masks", 2),
    ("bert", "--objective", "auto"),
    ("bert", "--objective", "outputs", "--grid", 0.1, 0.5, 0.1),
    ("bert", "--objective", "labels", "--task", "opinions", "--scope", "layer", "--rule", "published"),
    ("bert", "--objective", "learned", "--scope", "layer"),
    ("bert", "--objective", "two-point"),
    ("llama", "--objective", "labels", "--task", "word-problems"),
    ("llama", "--objective", "outputs", "--scope", "layer"),
    ("llama", "--objective", "closed-form"),
    ("llama", "--objective", "closed-form", "--scope", "layer"),
]


def digest_of(count, fine, objective):
    """Digest of the first examples of an objective: held-out or training ones, never test ones."""
    held_out, tokenizer = objective in ("labels", "predictions"), load_tokenizer(fine)
    if fine.parent.name == "llama":
        problems = load_problems("word-problems", "validation" if held_out else "train")
        return encode_problems(tokenizer, problems[:count]).digest()
    task = load_task("opinions")
    return encode(tokenizer, (task.validation if held_out else task.train).select(slice(count))).digest()


@pytest.mark.parametrize("way", RUNS, ids=lambda way: "-".join(map(str, way[::2])))
def test_find_q_writes_a_file_for_prune(folders, tmp_path, way):
    family, *way = way
    base, fine, q_file = folders / family / "base", folders / family / "fine", tmp_path / "q.json"
    count = 6 if family == "bert" else 2  # problems are long
    search = ("find-q", base, fine, "-p", 0.9, "--limit", count, "--out", q_file, *way)
    report = darex(*search)
    assert report == json.loads(q_file.read_text())
    assert report["manifest"]["inputs"]["data"] == digest_of(count, fine, report["objective"])
    names = set(flatten_names(dx.load_params(fine)))
    values = report["q"].values() if isinstance(report["q"], dict) else [report["q"]]
    assert (set(report["q"]) <= names) if "layer" in way else isinstance(report["q"], float)
    assert all(q > 0 for q in values)
    assert report["labels"] == (count if "labels" in way else 0) and report["evaluations"] > 0
    if "curve" in report:
        assert q_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    pruned = darex("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", q_file)
    assert pruned["survivors"] > 0
    before = q_file.read_bytes()
    text = darex(*search, json_too=False)
    assert q_file.read_bytes() == before  # the same command, the same file
    assert f"passes over {count} examples" in text and f"--q {q_file}" in text


def test_the_masks_are_those_of_the_seed(folders):
    """The measured change is that of `prune` with that key, computed explicitly."""
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    pair = open_pair(base, fine, 0.9)
    model, params = pair.model, pair.params
    tokenizer = load_tokenizer(fine)
    batches = evaluation_batches(encode(tokenizer, load_task("opinions").train.select(slice(6))))
    references = reference_outputs(model, params, batches)
    how = {"objective": "outputs", "grid": (0.1, 0.1, 0.1), "masks": 1}
    for seed in (0, 5):
        found = choose_q(base, fine, 0.9, Choice(seed=seed, **how), Source(limit=6))
        pruned = dx.apply_delta(pair.start, dx.prune(jax.random.key(seed), pair.delta, 0.9, 0.1))
        assert found["mask_seeds"] == [seed] and found["curve"][0][0] == 0.1
        assert found["curve"][0][1] == pytest.approx(output_change(model, pruned, batches, references))
    assert choose_q(base, fine, 0.9, Choice(seed=0, **how), Source(limit=6))["curve"][0] != found["curve"][0]


@pytest.mark.parametrize(
    ("family", "objective"),
    [("bert", "labels"), ("bert", "predictions"), ("bert", "outputs"), ("llama", "two-point")],
)
def test_one_copy_finds_the_same_q_in_less_memory(folders, family, objective):
    base, fine = folders / family / "base", folders / family / "fine"
    task = "opinions" if objective == "labels" else None
    source, held = Source(task=task, limit=12), {}

    def found(one_copy):
        def on_value(*_):
            alive = {id(x): x.nbytes for x in jax.live_arrays()}
            held[one_copy] = max(held.get(one_copy, 0), sum(alive.values()))

        gc.collect()
        before = sum(x.nbytes for x in jax.live_arrays())
        choice = Choice(objective=objective, masks=2, seed=3, one_copy=one_copy)
        result = choose_q(base, fine, 0.9, choice, source, on_value)
        held[one_copy] -= before
        return result

    whole, one = found(False), found(True)
    assert one == whole and len(one.get("curve") or one["changes"]) > 1
    pruned = sum(x.nbytes for x in jax.tree.leaves(open_pair(base, fine, 0.9).delta))
    assert held[False] - held[True] > pruned  # no fine-tuned model or delta, only survivors of two masks


def test_one_copy_is_refused_if_the_whole_delta_is_needed(folders):
    models = folders / "bert" / "base", folders / "bert" / "fine"
    for wrong in ({"objective": "closed-form"}, {"objective": "outputs", "scope": "layer"}):
        with pytest.raises(ValueError, match="it supports one q for the model by labels, pred"):
            choose_q(*models, 0.9, Choice(one_copy=True, **wrong), Source(limit=4))


def test_with_uninformative_examples_q_stays_dares(folders, tmp_path):
    base, fine, q_file = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "q.json"

    def warned(*arguments, why):
        report = darex("find-q", *arguments, "-p", 0.9, "--out", q_file)
        q = report["q"] if isinstance(report["q"], dict) else {"": report["q"]}
        assert all(x == pytest.approx(0.1) for x in q.values()) and why in report["warning"]
        assert "do not tell one q from another, and q stays at DARE's" in report["warning"]
        json.loads(q_file.read_text(), parse_constant=pytest.fail)  # neither NaN nor Infinity
        return report

    labels = ("--objective", "labels", "--task", "opinions", "--limit", 1)
    one_class = warned(base, fine, *labels, why="the labels of the 1 examples are all the same")
    assert one_class["evaluations"] == 0 and "curve" not in one_class
    warned(base, fine, *labels, "--scope", "layer", why="the labels of the 1 examples")
    assert darex("prune", base, fine, tmp_path / "d", "-p", 0.9, "--q", q_file)["survivors"] > 0
    some = ("--limit", 6, "--masks", 1)
    flat = warned(base, base, "--objective", "outputs", *some, why="output change is the same at every point")
    assert flat["curve"][0] == [0.1, 0.0] and flat["curve"][-1] == [1.0, 0.0]
    warned(
        base, base, "--objective", "outputs", "--grid", 0.2, 0.4, 0.1, *some, why="the same at every point"
    )
    warned(base, base, "--objective", "two-point", *some, why="the base gives the fine-tuned model's outputs")
    warned(base, base, "--objective", "closed-form", *some[:2], why="the delta changes no layer's output")
    learned = ("--objective", "learned", "--scope", "layer", "--limit", 6)
    warned(base, base, *learned, why="no epoch was better than the first q")
    find = ("find-q", base, base, "-p", 0.9, "--objective", "two-point", *some, "--out", q_file)
    assert "do not tell one q from another" in " ".join(darex(*find, json_too=False).split())
    text = ("--q", "outputs", "--text", folders / "text")
    assert (
        "outputs, without success: "
        in darex("prune", base, base, tmp_path / "d", "-p", 0.9, *text)["q_chosen_by"]
    )


def test_values_that_json_does_not_support_are_null(monkeypatch, folders, tmp_path):
    """A q whose outputs overflow is skipped, and reported in the file and the terminal."""
    from darex_jax.choosing import searched as module

    plain = output_objective

    def overflowing(model, fine, batches, flat=False):
        """Only the first value visited is not finite, that of the smallest q."""
        visited = itertools.count()

        def over_masks(values):
            return np.nan if next(visited) == 0 else 0.5 if flat else values[0]

        return plain(model, fine, batches)._replace(over_masks=over_masks)

    monkeypatch.setattr(module, "output_objective", overflowing)
    base, fine, q_file = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "q.json"
    find = ("find-q", base, fine, "-p", 0.99, "--objective", "outputs", "--limit", 6, "--masks", 1)
    text = darex(*find, "--out", q_file, json_too=False)
    report = json.loads(q_file.read_text(), parse_constant=pytest.fail)
    assert "not finite" in text and report["curve"][0] == [0.01, None] and report["q"] > 0.01
    assert "warning" not in report

    monkeypatch.setattr(module, "output_objective", partial(overflowing, flat=True))
    report = darex(*find, "--out", q_file)
    finite = [q for q, value in report["curve"] if value is not None]
    assert report["q"] == min(finite) > 0.01
    assert report["warning"].endswith("and the smallest with finite outputs is kept")


def test_the_early_stopping_examples_are_drawn_with_the_seed():
    for count in (2, 3, 4, 7, 200):
        rest, held_out = hold_out_quarter(count, 0)
        assert sorted([*rest, *held_out]) == list(range(count)) and len(held_out) == max(1, count // 4)
        assert len(rest) > 0
    first, other = hold_out_quarter(200, 0)[1], hold_out_quarter(200, 1)[1]
    assert first.tolist() != other.tolist() and not np.isin(np.arange(50), first).all()
    assert 60 < first.mean() < 140


def test_learning_gets_texts_of_all_lengths_and_counts_its_passes(folders, monkeypatch):
    from darex_jax.choosing import learned as module

    seen = {}

    def learn(pair, masked, layers, batches, held_out, how):
        seen.update(rest=batches, held_out=held_out, masked=masked)
        history = [(3.0, 3.0), (2.5, 2.0), (2.0, 1.0)]
        return LearnedQ(dict.fromkeys(flatten_names(masked), 0.2), 1.0, history)

    monkeypatch.setattr(module, "learn_q", learn)
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    choice = Choice(objective="learned", scope="layer", seed=3)
    found = choose_q(base, fine, 0.9, choice, Source(limit=40))
    examples = encode(load_tokenizer(fine), load_task("opinions").train.select(slice(40)))

    def texts(batches):
        return sorted(
            tuple(ids[mask > 0])
            for b in batches
            for ids, mask, w in zip(b["input_ids"], b["attention_mask"], b["weight"], strict=True)
            if w
        )

    rest, held_out = (texts(seen[part]) for part in ("rest", "held_out"))
    assert len(held_out) == 10 and sorted(rest + held_out) == sorted(map(tuple, examples.input_ids))
    assert max(map(len, held_out)) > np.median([len(ids) for ids in examples.input_ids])
    # First the 10; in each of two epochs 30 forwards and backwards, which counts as 90, and the 10.
    assert found["evaluations"] == (10 + 2 * (90 + 10)) / 40 and found["examples"] == 40
    _, params, in_scope = load_pair(base, fine)
    masked = dx.prune(jax.random.key(3), split_in_scope(params, in_scope)[1], 0.9, 1.0)
    jax.tree.map(np.testing.assert_array_equal, seen["masked"], masked)
    with pytest.raises(ValueError, match="learned needs at least two examples"):
        choose_q(base, fine, 0.9, replace(choice, seed=0), Source(limit=1))


def test_float16_is_searched_in_float32(folders, tmp_path):
    for name in ("base", "fine"):
        source = folders / "bert" / name
        half = jax.tree.map(lambda x: x.astype(jnp.float16), dx.load_params(source))
        config = json.loads((source / "config.json").read_text())
        dx.save_params(tmp_path / name, half, config, companions_from=source)
    _, params, base = load_pair(tmp_path / "base", tmp_path / "fine")
    assert {x.dtype for x in jax.tree.leaves((params, base))} == {jnp.dtype(jnp.float32)}
    told = []
    found = choose_q(
        tmp_path / "base", tmp_path / "fine", 0.9, Choice(objective="two-point", masks=1), Source(limit=4),
        on_value=lambda q, change: told.append([q, change]),
    )  # fmt: skip
    assert told == found["changes"] and found["q"] == told[-1][0]  # shown and measured values


def test_a_narrow_base_is_widened_to_its_fine_tune(folders, tmp_path):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dx.load_params(folders / "bert" / "base"))
    config = json.loads((folders / "bert" / "base" / "config.json").read_text())
    dx.save_params(tmp_path / "base", narrow, config)
    _, _, base = load_pair(tmp_path / "base", folders / "bert" / "fine")
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.float32)}


def test_text_grid_and_task_are_checked_before_a_model_is_loaded(folders, tmp_path, monkeypatch):
    from darex_jax.choosing import choose as module

    monkeypatch.setattr(module, "open_pair", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "latin").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "empty").write_text("\n")
    models = folders / "bert" / "base", folders / "bert" / "fine"
    for wrong, source, told in (
        ({}, {"text": tmp_path / "latin"}, "latin: line 1 is not UTF-8 text"),
        ({}, {"text": tmp_path / "empty"}, "empty: has no line of text"),
        ({"grid": (0.5, 0.1, 0.1)}, {}, "need 0 < low <= high and step > 0"),
        ({"objective": "two-point", "grid": (0.1, 0.5, 0.1)}, {}, "two-point does not search a grid"),
        ({"objective": "outputs", "statistics": Path("s")}, {}, "--statistics and --rule are for searches"),
        ({"objective": "closed-form", "scope": "layer", "rule": "exact"}, {}, "--statistics and --rule are"),
        ({"objective": "outputs", "checkpoints": Path("c")}, {}, "are for --objective learned"),
        ({}, {"task": "gsm8k"}, "gsm8k is for decoders"),
        ({}, {"task": "nonsense"}, "unknown task 'nonsense'"),
        ({"objective": "labels"}, {}, "labels needs the model's task: pass --task"),
        ({}, {"text": tmp_path / "none"}, "none: No such file or directory"),
    ):
        with pytest.raises(ValueError, match=told):
            choose_q(*models, 0.9, Choice(**({"objective": "outputs"} | wrong)), Source(**source))


@pytest.mark.parametrize("changed", ["base", "fine"])
def test_a_q_file_is_for_its_pair_mask_and_scope(folders, tmp_path, changed):
    pair = {name: folders / "bert" / name for name in ("base", "fine")}
    q_file, out = tmp_path / "q.json", tmp_path / "d"
    how = ("--objective", "outputs", "--masks", 1, "--limit", 4, "--grid", 0.1, 0.1, 0.1, "--out", q_file)
    darex("find-q", *pair.values(), "-p", 0.9, *how)

    def prune(*options, base=pair["base"], fine=pair["fine"]):
        arguments = ("prune", base, fine, out, "-p", 0.9, "--q", q_file, *options)
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert (result.exit_code == 0) == out.exists()
        out.unlink(missing_ok=True)
        return result.stderr

    assert "warning" not in prune() and "warning" not in prune("--json")
    assert "chosen with the mask of seed 0, not 3" in prune("--seed", 3)
    assert "chosen with --exclude not given, not with ['pooler']" in prune("--exclude", "pooler")
    other = tmp_path / "other"
    moved = flatten_names(dx.load_params(pair[changed]))
    name = "bert.encoder.layer.0.output.dense.weight"  # one entry, by one bit
    moved[name] = moved[name].at[3, 5].set(jnp.nextafter(moved[name][3, 5], jnp.float32(9)))
    config = json.loads((pair[changed] / "config.json").read_text())
    dx.save_params(other, unflatten_names(moved), config)
    kind = {"base": "base", "fine": "fine-tuned model"}[changed]
    assert f"was chosen for another {kind} than {other}" in prune(**{changed: other})
    # Files without a manifest, or with one of another kind, are accepted without checks.
    for content in ({"q": 0.2}, {"q": 0.2, "manifest": []}, {"q": 0.2, "manifest": {"inputs": 3}}):
        q_file.write_text(json.dumps(content))
        assert prune(**{changed: other}) == ""


def test_without_a_task_no_label_is_used(folders, tmp_path):
    """The default of find-q is predictions, or two-point for a model without classes."""
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    some = ("-p", 0.9, "--limit", 2, "--masks", 1, "--out", tmp_path / "q.json")
    report = darex("find-q", base, fine, *some)
    assert (report["objective"], report["labels"], report["data"]) == (
        "predictions",
        0,
        "opinions (generated)",
    )
    assert without_labels(folders / "llama" / "fine", "model") == "predictions"
    for name, changes in (("one", {"num_labels": 1}), ("body", {"architectures": ["BertForMaskedLM"]})):
        (tmp_path / name).mkdir()
        config = json.loads((fine / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert without_labels(tmp_path / name, "model") == "two-point"
        assert without_labels(tmp_path / name, "layer") == "outputs"


def test_statistics_are_kept_and_checked(folders, tmp_path):
    file = tmp_path / "statistics.safetensors"
    models = folders / "bert" / "base", folders / "bert" / "fine"
    options = ("--objective", "outputs", "--scope", "layer", "--statistics", file)
    search = ("find-q", *models, "-p", 0.9, *options, "--out", tmp_path / "q.json")
    first = darex(*search, "--limit", 6)
    written = file.stat().st_mtime_ns
    assert darex(*search, "--limit", 6) == first and file.stat().st_mtime_ns == written
    result = CliRunner().invoke(main, [*map(str, search), "--limit", "7"])
    assert result.exit_code == 1 and "made from another data; write a new one" in result.stderr


def test_learning_does_not_resume_from_other_inputs(folders, tmp_path):
    models = folders / "bert" / "base", folders / "bert" / "fine"
    way = ("--objective", "learned", "--scope", "layer", "--limit", 6, "--out", tmp_path / "q.json")
    kept = ("--checkpoints", tmp_path / "run")
    first = darex("find-q", *models, "-p", 0.9, *way, *kept)
    (place,) = (tmp_path / "run").iterdir()
    with only_one(place / "lock", ""):  # as if the same search were running; others are not affected
        same = CliRunner().invoke(main, [str(x) for x in ("find-q", *models, "-p", 0.9, *way, *kept)])
        other = darex("find-q", *models, "-p", 0.8, *way, *kept)
    assert same.exit_code == 1 and "the same search is already running with its checkpoints in" in same.stderr
    assert other["curve"][0] != first["curve"][0] and min(other["q"].values()) >= 0.2 - 1e-6
    slow = darex("find-q", *models, "-p", 0.9, *way, *kept, "--learning-rate", 1e-3)
    assert slow["curve"][0] == first["curve"][0] and slow["curve"][1] != first["curve"][1]
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert darex("find-q", *models, "-p", 0.9, *way, *kept) == first


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prune_chooses_q_by_the_inputs_given(folders, tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, fine = folders / family / "base", folders / family / "fine"
    prune = ("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", "auto")
    task = {"bert": "opinions", "llama": "word-problems"}[family]
    nothing = darex(*prune)
    assert nothing["q_chosen_by"].startswith("default: ")
    assert darex("inspect", tmp_path / "delta")["q"] == [pytest.approx(0.1)]
    assert nothing["q"] == pytest.approx(0.1)
    texts = darex(*prune, "--text", folders / "text")
    assert "predictions: agreement" in texts["q_chosen_by"] and "on 3 examples" in texts["q_chosen_by"]
    assert darex("inspect", tmp_path / "delta")["q"] == [texts["q"]]
    if family == "bert":  # 500 labelled problems would take long
        labels = darex(*prune, "--task", task)
        assert labels["q_chosen_by"].startswith("labels: validation accuracy")
    solved = darex(*prune[:-1], "closed-form", "--text", folders / "text")
    assert solved["q_chosen_by"] == "closed-form: solved on 3 examples" and solved["q"] > 0.1
    text = darex(*prune, "--text", folders / "text", json_too=False)
    assert "chosen by" in text and "predictions: agreement" in text
    learned = darex(*prune[:-1], "learned", "--text", folders / "text")
    assert learned["q_chosen_by"].startswith("learned: held-out output change")
    find = ("find-q", base, fine, "-p", 0.9, "--objective", "closed-form", "--text", folders / "text")
    some = ("--exclude", "layers?[.]0", "--seed", 3, "--out", tmp_path / "some q.json")
    use = shlex.split(darex(*find, *some, json_too=False).split("Use it: ")[1])
    assert use[0] == "darex" and use[-4:] == ["--seed", "3", "--exclude", "layers?[.]0"]
    assert darex(*use[1:])["survivors"] > 0 and (Path.cwd() / "OUT").exists()


def test_the_terminal_names_every_objective():
    (option,) = (option for option in main.commands["find-q"].params if option.name == "objective")
    assert list(option.type.choices) == ["auto", *WAYS]
    assert all(f"{name}: {way.what}" in option.help for name, way in WAYS.items())


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_where_the_table_says(name):
    assert WAYS[name].find.__module__ == f"darex_jax.choosing.{WAYS[name].place.split('.')[0]}"
    assert WAYS[name].find.__doc__


def test_mistakes_are_explained(folders, tmp_path):
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"

    def fails(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code != 0 and "Traceback" not in result.output
        return result.stderr

    find = ("find-q", base, fine, "-p", 0.9, "--out", tmp_path / "q.json")
    assert "pass --scope layer" in fails(*find, "--objective", "learned")
    assert "pass --scope model" in fails(*find, "--objective", "two-point", "--scope", "layer")
    assert "uses no mask; leave out --masks" in fails(*find, "--objective", "closed-form", "--masks", 8)
    assert "texts have no labels" in fails(*find, "--objective", "labels", "--text", folders / "text")
    assert "gsm8k is for decoders" in fails(*find, "--task", "gsm8k")
    assert "come from one place" in fails(
        *find, "--objective", "outputs", "--task", "sst2", "--text", folders / "text"
    )
    (tmp_path / "empty").write_text("\n")
    assert "has no line of text" in fails(*find, "--objective", "outputs", "--text", tmp_path / "empty")
    assert "pass --task" in fails(*find, "--objective", "labels")
    assert "choosing q needs a drop rate between 0 and 1" in fails("find-q", base, fine, "-p", 0.0)
    assert "--task, --data-dir, --text, --data and --limit are for --q auto or an" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--task", "sst2"
    )
    assert "is a directory; a regular file is needed" in fails(*find[:-1], tmp_path)
    assert "it is a picture" in fails(*find[:-1], tmp_path / "q.png")
    (tmp_path / "mine.txt").write_text("some words\n")
    (tmp_path / "mine.json").write_text('{"q": 0.5}')
    own = ("--objective", "two-point", "--text", tmp_path / "mine.txt")
    for command, kept in (
        ((*find[:-1], tmp_path / "mine.txt", *own), tmp_path / "mine.txt"),
        ((*find[:-1], fine / "config.json", *own), fine / "config.json"),
        (("prune", base, fine, tmp_path / "mine.txt", "-p", 0.9, "--q", *own[1:]), tmp_path / "mine.txt"),
        (("prune", base, fine, tmp_path / "mine.json", "-p", 0.9, "--q", tmp_path / "mine.json"),
         tmp_path / "mine.json"),
    ):  # fmt: skip
        before = kept.read_bytes()
        assert "writing this would replace" in fails(*command) and kept.read_bytes() == before
    for command in (find, ("train", base, tmp_path / "out"), ("eval", fine), ("demo", "--base", base)):
        assert "pass the task as well" in fails(*command, "--data-dir", tmp_path)
    assert "of generated problems" in fails(*find, "--task", "opinions", "--difficulty", 2)
    (tmp_path / "other.json").write_text('{"q": 0.02, "drop_rate": 0.99}')
    assert "chosen for a drop rate of 0.99, not 0.9" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--q", tmp_path / "other.json"
    )
    prune = ("prune", base, fine, tmp_path / "d")
    assert "pass --drop-rate 0.99, not a size" in fails(
        *prune, "--method", "dare", "--size", "3x", "--q", tmp_path / "other.json"
    )
    (tmp_path / "named.json").write_text('{"q": {"x": 0.1}}')
    for method, q, told in (
        ("dare", 0, "must be a positive float32 number, got 0"),
        ("dare", "nan", "must be a positive float32 number"),
        ("dare", tmp_path / "named.json", "q has no entry for"),
        ("structured", tmp_path / "named.json", "one q, not by one for each parameter"),
        ("structured", "outputs", "tries masks of entries, structured drops columns"),
    ):
        assert told in fails(*prune, "--method", method, "-p", 0.9, "--bits", 4, "--q", q)
    for stray, told in (
        (("-p", 0.9, "--steps", 5), "dare does not train; leave out --steps"),
        (("--size", "3x", "--steps", 5), "It is the default because there are no texts"),
        (("-p", 0.9, "--limit", 5), "and --limit are for"),
        (("-p", 0.9, "--q", "auto", "--data-dir", tmp_path), "pass the task as well"),
        (("-p", 0.9, "--method", "sign"), "keeps the sign of every entry"),
        (("--method", "distilled", "--support", "sign", "--max-loss", 0.1), "--support sign has one size"),
        (("--method", "distilled", "--support", "sign", "-p", 0.9), "--support sign keeps every sign"),
        (("--method", "svd", "--size", "1e12x"), "less than a byte"),
        (("--method", "svd", "--bytes-per-parameter", "inf"), "inf is not a finite number"),
    ):
        assert told in fails(*prune, *stray)
    assert not (tmp_path / "q.json").exists() and not (tmp_path / "d").exists()


@pytest.mark.parametrize("asked", [126, 127, 139, 200])
def test_a_method_that_needs_some_room_gets_it_where_there_is(tmp_path, asked):
    """Signs of a thousand parameters take 125 bytes, and refuse less; the file has one byte more."""
    tried = []

    def write(room, path):
        tried.append(room)
        if room < 125:
            raise TooSmall("signs alone take 125 bytes")
        return SimpleNamespace(file_bytes=126, recipe=SimpleNamespace(blocks=[{"bytes": 125}]))

    assert fit_to_size(write, asked, tmp_path)[0].file_bytes == 126 and max(tried) <= 2 * asked
    with pytest.raises(TooSmall, match="signs alone"):
        fit_to_size(write, 100, tmp_path)


def test_statistics_are_of_all_the_texts_that_are_given(folders, tmp_path):
    base, fine, texts = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i} words\n" for i in range(230)))
    known, _ = gather(base, fine, Source(text=texts), ("input_norms",))
    model, params = dx.load_model(fine)
    batches = read_material(fine, Source(text=texts), "train").batches()
    for name, seen in input_statistics(model, params, batches).items():
        np.testing.assert_allclose(known.input_norms[name], np.sqrt(seen.square * seen.tokens), rtol=1e-5)


# Methods that train, from the command line.


@pytest.mark.parametrize(("family", "support"), [("bert", "random"), ("llama", "low-rank")])
def test_prune_trains_a_delta_of_the_requested_size(folders, tmp_path, family, support):
    base, fine = folders / family / "base", folders / family / "fine"
    texts = tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["prune", base, fine, tmp_path / "d", "--method", "distilled", "--size", "1.3x", "--steps", 6]
    line += ["--support", support]
    report = darex(*line, "--text", texts)
    assert report["method"] == "distilled" and report["bytes"] <= report["fine_bytes"] / 1.3
    assert not report["warnings"] and "generated texts only" in darex(*line, "--limit", 40)["warnings"][0]
    assert darex(*line, "--text", texts)["digest"] == report["digest"]  # a repeat gives the same file
    named = flatten_names(dx.load_delta(tmp_path / "d"))
    assert any(np.any(np.asarray(x)) for name, x in named.items() if name.endswith("weight"))
    (tmp_path / "one").write_text("a single line\n")
    refused = CliRunner().invoke(main, list(map(str, [*line, "--text", tmp_path / "one"])))
    assert refused.exit_code == 1 and "needs at least two texts" in refused.stderr


def test_the_default_method_depends_on_the_inputs(folders, tmp_path, monkeypatch):
    base, fine, texts = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["prune", base, fine, tmp_path / "d", "--size", "4x"]
    alone = darex(*line)
    assert alone["method"] == "dare" and "there are no texts" in alone["method_chosen_by"]
    few = darex(*line, "--text", texts)
    assert few["method"] == "dare" and "40 texts choose q" in few["method_chosen_by"]
    assert few["bytes"] <= few["fine_bytes"] / 4 and "two-point" in few["q_chosen_by"]
    assert few["inexact"] is None  # counted in format 1 alone
    with DeltaFile(tmp_path / "d") as file:
        assert file.recipe.options["q"] == few["q"]
        assert file.recipe.evidence.keys() == {"fine_weights", "q_data"}
    whole = darex(*line[:4], "--bytes-per-parameter", 4, "--text", texts)
    assert whole["method"] == "dare" and "q_chosen_by" not in whole  # nothing is dropped
    monkeypatch.setattr("darex_jax.cli.prune.ENOUGH", 40)
    many = darex(*line, "--text", texts, "--steps", 3)
    assert many["method"] == "distilled" and "40 texts" in many["method_chosen_by"]
    assert darex(*line[:4], "-p", 0.9)["method"] == "dare"
    for wrong, text in ((("--q", 0.1), "best chooses q itself"), ((), "is measured on texts")):
        options = [
            *line[:4],
            "--method",
            "best",
            *(("--max-loss", 0.1) if not wrong else ("--size", "2x")),
            *wrong,
        ]
        refused = CliRunner().invoke(main, list(map(str, options)))
        assert refused.exit_code == 2 and text in refused.stderr


def test_a_loss_of_the_metric_is_the_metrics(folders, tmp_path, monkeypatch):
    """A metric that says the opposite of the agreement: larger files are worse."""
    from darex_jax.runs import prune as module

    monkeypatch.setattr(module, "SIZES", (0.05, 1.5))
    monkeypatch.setattr(module, "PLACES", 3)
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    source = Source(task="opinions", limit=30)
    evidence, digests = gather(base, fine, source, METHODS["distilled"].needs, steps=3, with_metric=True)
    assert evidence.train.metric.name == "accuracy" and evidence.train.metric.examples == 30
    scores, told = [0.7, 0.8, 0.95], []
    evidence.train.metric = evidence.train.metric._replace(fine=1.0, of=lambda params: scores[len(told)])
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        job = Job(b, f, tmp_path / "d", choose_scope("bert"))
        options = {"gathered": (evidence, digests), "on_size": lambda *seen: told.append(seen)}
        module.prune_within(job, "distilled", 0.1, of="metric", **options)
        assert [score for _, score in told] == scores
        sizes = [size for size, _ in told]
        assert sizes[0] < sizes[1] == pytest.approx(sizes[2], rel=0.01)
        assert (tmp_path / "d").stat().st_size == sizes[2]
        bare = replace(evidence.train, metric=None)
        options["gathered"] = replace(evidence, train=bare), digests
        with pytest.raises(DarexError, match="with_metric"):
            module.prune_within(job, "distilled", 0.1, of="metric", **options)


@pytest.mark.parametrize("metric", ["token_accuracy", None, "loss"])
def test_the_metric_of_a_decoder_is_of_completions(folders, tmp_path, metric):
    base, fine, rows = folders / "llama" / "base", folders / "llama" / "fine", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{i} and", "a": f" {i % 3}"}) + "\n" for i in range(40)))
    table = Table(data=str(rows), prompt="q", completion="a", metric=metric)
    needs = METHODS["distilled"].needs
    if metric == "loss":
        with pytest.raises(DarexError, match="not loss"):
            gather(base, fine, Source(table=table), needs, with_metric=True)
        return
    evidence, _ = gather(base, fine, Source(table=table), needs, with_metric=True)
    found = evidence.train.metric
    assert found.name == (metric or "exact_match") and found.examples == 4
    model, params = dx.load_model(fine)
    batches = read_material(fine, Source(table=table), "validation").batches()
    scores = answer_scores(model, params, batches)
    assert found.fine == (scores.tokens if metric else scores.answers)
    for wrong in (Source(table=Table(data=str(rows), text="q", label="a")), Source(text=rows)):
        with pytest.raises(DarexError, match="a decoder: --prompt and --completion"):
            gather(base, fine, wrong, needs, with_metric=True)


def test_prune_finds_the_smallest_file_within_a_loss(folders, tmp_path, monkeypatch):
    from darex_jax.runs import prune as module

    monkeypatch.setattr(module, "SIZES", (0.05, 1.5))
    monkeypatch.setattr(module, "PLACES", 4)
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    texts = tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["prune", base, fine, tmp_path / "d", "--method", "distilled", "--text", texts, "--steps", 9]
    loose, strict = (darex(*line, "--max-loss", loss) for loss in (0.9, 0.2))
    for loss, report in ((0.9, loose), (0.2, strict)):
        assert 1 - report["agreement"] <= loss and report["held_out"] == 20
    assert (tmp_path / "d").stat().st_size == strict["bytes"] >= loose["bytes"]
    for wrong, text in (
        (("--max-loss", 0.1, "--size", "3x"), "pass exactly one of"),
        (("--max-loss", 0.1, "--method", "svd"), "needs a method that trains (distilled), not svd"),
        (("--size", "3x", "--method", "svd", "--checkpoints", tmp_path / "c"), "svd does not train"),
        (("--size", "3x", "--method", "sign", "--bits", 4), "sign has fixed bits"),
        (("--size", "3x", "--method", "svd", "--support", "random"), "svd has a fixed support"),
    ):
        refused = CliRunner().invoke(main, list(map(str, [*line[:-2], *wrong])))
        assert refused.exit_code == 2 and text in refused.stderr
    monkeypatch.setattr(module, "SIZES", (1.5, 1.5))
    monkeypatch.setattr(module, "PLACES", 1)
    seeded = [*line[:-1], 3, "--support", "random", "--max-loss", 0.9]
    assert darex(*seeded, "--seed", 0)["digest"] != darex(*seeded, "--seed", 3)["digest"]
    labelled = tmp_path / "rows.jsonl"
    rows = [{"said": f"{'abc'[i % 3]}{i % 7} some words", "is": i % 3 % 2} for i in range(60)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_metric = [*line[:-4], "--data", labelled, "--text", "said", "--label", "is", "--steps", 9]
    metric = darex(*of_metric, "--max-loss", 0.5, "--loss-of", "metric")
    assert metric["metric_name"] == "accuracy"
    scored = ["--data", labelled, "--text", "said", "--label", "is", "--split", "validation"]
    assert darex("eval", base, "--delta", tmp_path / "d", *scored)["metric"] == metric["metric"]
    assert darex("eval", fine, *scored)["metric"] - metric["metric"] <= 0.5
    assert metric["labelled"] == 6 and metric["fine_metric"] == darex("eval", fine, *scored)["metric"]
    for wrong, code, text in (
        (("--max-loss", 0.99, "--loss-of", "metric", *of_metric[-8:-2]), 1, "would leave nothing of it"),
        (("--max-loss", 0.1, "--loss-of", "metric"), 1, "a metric is measured on labels"),
        (("--size", "3x", "--loss-of", "metric"), 2, "--loss-of says what --max-loss is of"),
    ):
        texts_or_rows = line[:-4] if "--data" in wrong else line
        refused = CliRunner().invoke(main, list(map(str, [*texts_or_rows, *wrong])))
        assert refused.exit_code == code and text in refused.stderr
    own = fine / "model.safetensors"
    before = own.read_bytes()
    over = [own if x == tmp_path / "d" else x for x in line]
    refused = CliRunner().invoke(main, list(map(str, [*over, "--max-loss", 0.9])))
    assert refused.exit_code == 1 and own.read_bytes() == before
    monkeypatch.setattr(module, "SIZES", (0.001, 0.002))
    refused = CliRunner().invoke(main, list(map(str, [*line, "--max-loss", 0.0])))
    assert refused.exit_code == 1 and "allow a larger loss" in refused.stderr
