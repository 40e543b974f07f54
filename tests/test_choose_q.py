"""Choosing q on tiny models: objectives, one q, one a layer, in closed form, learned; find-q and prune."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.tree import flatten_names
from darex_jax.evaluation.calibration import input_statistics, squared_influences
from darex_jax.evaluation.classification import _logits, pruned_params
from darex_jax.evaluation.find_q import (
    eta_grid,
    find_q,
    layer_rule,
    masked_deltas,
    q_grid,
    split_in_scope,
    two_point,
)
from darex_jax.evaluation.learned_q import learn_q
from darex_jax.evaluation.objectives import (
    Objective,
    answer_objective,
    label_objective,
    output_objective,
    prediction_objective,
)
from darex_jax.evaluation.outputs import output_change_sums, reference_outputs
from darex_jax.models import init_model, read_model_config
from darex_jax.q.closed_form import closed_form, two_point_q
from darex_jax.tasks import Examples, Task
from darex_jax.training.checkpoints import Checkpoints
from tests.test_calibration import FAMILIES, make, make_batches, raw_inputs

DROP_RATE = 0.9


def pair(family):
    """A model, a fine-tune of it, and the delta of its linear layers, norms and embeddings."""
    model, base = make(family)
    fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
    head = ("classifier.", "lm_head.", "score.")
    in_scope = {name: leaf for name, leaf in flatten_names(base).items() if not name.startswith(head)}
    start, delta = split_in_scope(fine, dx.core.tree.unflatten_names(in_scope))
    return model, fine, start, delta


def with_labels(batches):
    """Batches as `evaluation_batches` makes them, of a task with two classes."""
    rng, first = np.random.default_rng(1), 0
    places = rng.permutation(sum(len(batch["weight"]) for batch in batches)).astype(np.int32)
    for batch in batches:
        rows = len(batch["weight"])
        batch["labels"] = rng.integers(0, 2, rows).astype(np.int32)
        batch["index"] = places[first : first + rows]
        batch["loss_mask"] = batch["attention_mask"] * batch["weight"][:, None]
        first += rows
    return batches


EMPTY = Examples((), None, np.zeros(0, np.int32))
TASK = Task("pairs", "classification", ("a", "b"), "accuracy", EMPTY, EMPTY, EMPTY)


def test_objectives_of_a_classifier_by_hand():
    model, fine, start, _ = pair("bert")
    batches = with_labels(make_batches())
    real = np.concatenate([b["weight"] > 0 for b in batches])
    classes = {}
    for name, params in (("fine", fine), ("start", start)):
        logits = [model(params, b["input_ids"], b["attention_mask"]).logits for b in batches]
        classes[name] = np.concatenate(logits)[real].argmax(-1)
    labels = np.concatenate([b["labels"] for b in batches])[real]
    by_labels = label_objective(model, TASK, batches)
    assert by_labels.measure(start) == pytest.approx((classes["start"] == labels).mean())
    assert (by_labels.examples, by_labels.labels, by_labels.name) == (22, 22, "validation accuracy")
    for metric in (None, TASK.metric):
        by_predictions = prediction_objective(model, fine, batches, metric)
        assert by_predictions.measure(fine) == 1.0 and by_predictions.labels == 0
        assert by_predictions.measure(start) == pytest.approx((classes["start"] == classes["fine"]).mean())
    assert output_objective(model, fine, batches).measure(fine) == 0.0


def test_objectives_of_a_decoder_by_hand():
    model, fine, start, _ = pair("llama")
    batches = with_labels(make_batches())
    same = total = 0
    for b in batches:
        first = [
            np.asarray(model(p, b["input_ids"], b["attention_mask"]).logits).argmax(-1) for p in (fine, start)
        ]
        real = (b["attention_mask"] > 0) & (b["weight"] > 0)[:, None]
        same, total = same + (first[0] == first[1])[real].sum(), total + real.sum()
    by_predictions = prediction_objective(model, fine, batches)
    assert by_predictions.measure(fine) == 1.0
    assert by_predictions.measure(start) == pytest.approx(same / total)
    by_answers = answer_objective(model, batches)
    assert (by_answers.examples, by_answers.labels) == (22, 22) and 0.0 <= by_answers.measure(start) <= 1.0


def test_a_model_with_one_output_is_compared_by_its_tasks_metric():
    config = FAMILIES["bert"] | {"num_labels": 1}
    model, params = init_model(read_model_config(config), jax.random.key(0))
    batches = with_labels(make_batches())
    task = Task("scores", "regression", (), "pearson_and_spearman", EMPTY, EMPTY, EMPTY)
    assert prediction_objective(model, params, batches, task.metric).measure(params) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="needs its task's metric to compare scores"):
        prediction_objective(model, params, batches)


def test_a_sweep_over_values_and_masks_compiles_once():
    model, _, start, delta = pair("bert")
    masked = masked_deltas(delta, DROP_RATE, (0, 1, 2))
    goal = label_objective(model, TASK, with_labels(make_batches()))
    goal.measure(pruned_params(start, masked[0], 0.1))
    before = pruned_params._cache_size(), _logits._cache_size()
    found = find_q(goal, start, masked, q_grid(DROP_RATE))
    assert len(found.curve) > 6 and (pruned_params._cache_size(), _logits._cache_size()) == before


def test_masks_are_averaged_as_the_objective_says():
    _, _, start, delta = pair("bert")
    masked = masked_deltas(delta, DROP_RATE)
    sizes = [float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(m))) for m in masked]

    def size(params):  # of what was added to the base: the masked delta over q
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).sum(), params, start)
        return float(sum(jax.tree.leaves(moved)))

    seen = []
    goal = Objective("size", size, True, lambda values: seen.append(values) or max(values), 0)
    found = find_q(goal, start, masked, [0.5, 1.0])
    assert found.q == 0.5 and found.value == pytest.approx(2 * max(sizes), rel=1e-4)
    np.testing.assert_allclose(seen[0], [2 * s for s in sizes], rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["exact", "published"])
def test_layers_by_outputs(family, rule):
    model, fine, start, delta = pair(family)
    batches = make_batches()
    q_of = layer_rule(input_statistics(model, fine, batches), delta, DROP_RATE, rule)
    names = set(flatten_names(delta))
    goal = output_objective(model, fine, batches)
    found = find_q(goal, start, masked_deltas(delta, DROP_RATE), eta_grid(), q_of=q_of)
    q = q_of(found.q)
    assert set(q) == names and all(1 - DROP_RATE - 1e-9 <= x <= 1.0 for x in q.values())
    assert found.value == min(value for _, value in found.curve)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_is_that_of_the_raw_inputs(family):
    model, fine, _, delta = pair(family)
    batches = make_batches()
    found = closed_form(squared_influences(model, fine, delta, batches), DROP_RATE)
    named = flatten_names(delta)
    total = np.zeros(2)
    for name, x in raw_inputs(model, fine, batches).items():
        if name in named:
            weights = np.asarray(named[name], np.float64)
            sums = np.array([weights**2 @ (x**2).mean(0), ((x @ weights.T) ** 2).mean(0)])
            np.testing.assert_allclose(found.rows[name], 0.1 + 0.9 * sums[0] / sums[1], rtol=1e-3)
            layer = sums.sum(1)
            assert found.layers[name] == pytest.approx(0.1 + 0.9 * layer[0] / layer[1], rel=1e-3)
            total += layer
    assert found.q == pytest.approx(0.1 + 0.9 * total[0] / total[1], rel=1e-3)
    with pytest.raises(ValueError, match="no linear layer is in scope"):
        closed_form(squared_influences(model, fine, {"other": jnp.ones((2, 2))}, batches), DROP_RATE)


def test_two_points_give_the_minimum_of_a_linear_model():
    """E(q) = a (1 - (1-p)/q)^2 + b / q^2, measured at q = infinity and elsewhere, against a fine scan."""
    rng = np.random.default_rng(0)
    for p in (0.5, 0.9, 0.999):
        a, b = rng.uniform(0.1, 10, 2) * [1.0, (1 - p) ** 2]

        def error(q, a=a, b=b, p=p):
            return a * (1 - (1 - p) / q) ** 2 + b / q**2

        q = two_point_q(a, error(1 - p), p)
        scan = np.linspace(0.5 * q, 2 * q, 200_001)
        assert q == pytest.approx(scan[error(scan).argmin()], rel=1e-4)
        assert two_point_q(a, error(3 * (1 - p)), p, 3 * (1 - p)) == pytest.approx(q)
    assert two_point_q(1.0, 1.5, 0.9, 0.2) > 0.4
    for wrong in (
        (0.0, 1.0, 0.9),
        (1.0, -1.0, 0.9),
        (1.0, np.nan, 0.9),
        (1.0, 1.0, 1.0),
        (1.0, 1.0, 0.5, 0.0),
    ):
        with pytest.raises(ValueError, match=r"errors are finite|need 0 <= drop_rate"):
            two_point_q(*wrong)


def squared_change(model, fine, batches, params):
    total = count = 0
    for b in batches:
        mask = (b["attention_mask"] > 0) & (b["weight"] > 0)[:, None]
        hidden = [np.asarray(model(x, b["input_ids"], b["attention_mask"])[0]) for x in (params, fine)]
        square = ((hidden[0] - hidden[1]) ** 2).mean(-1)
        total, count = total + square[mask].sum(), count + mask.sum()
    return total / count


def test_two_point_measures_the_squared_change_of_base_and_dare():
    model, fine, start, delta = pair("bert")
    batches = make_batches()
    masked = masked_deltas(delta, DROP_RATE, (0, 1))
    q, visited = two_point(model, fine, start, masked, batches, DROP_RATE)
    (_, without), (first, dare), *later = visited
    assert first == 0.1 and len(later) >= 1
    assert without == pytest.approx(squared_change(model, fine, batches, start), rel=1e-4)
    pruned = [squared_change(model, fine, batches, pruned_params(start, m, 0.1)) for m in masked]
    assert dare == pytest.approx(np.mean(pruned), rel=1e-4)
    assert later[0][0] == pytest.approx(0.1 * (1 + dare / without))
    assert q == later[-1][0] and later[-1][1] <= 1.1 * without


def test_two_point_leaves_where_outputs_are_saturated(monkeypatch):
    """A change that cannot exceed 3 hides how large the noise is: q grows until it is better than none."""
    from darex_jax.evaluation import find_q as module

    p, a, b = 0.999, 1.0, 1e-4  # in the linear model, E(1 - p) is 100 and the best q 0.101

    def change(model, params, batches, reference, squared):
        q = params
        return a if q is None else min(3.0, a * (1 - (1 - p) / q) ** 2 + b / q**2)

    monkeypatch.setattr(module, "output_change", change)
    monkeypatch.setattr(module, "pruned_params", lambda start, masked, q: q)
    monkeypatch.setattr(module, "reference_outputs", lambda *_: None)
    q, visited = two_point(None, None, None, [0], [], p)
    values = [q for q, _ in visited[1:]]
    assert all(2 * low <= high for low, high in pairwise(values[1:]))
    assert 0.03 < q < 0.102 and q == values[-1] and visited[-1][1] <= 1.1


# Learned.


def learning(family, **options):
    model, fine, start, delta = pair(family)
    layers = [name for name in flatten_names(delta) if name.endswith("weight") and "orm" not in name
              and "embed" not in name]  # fmt: skip
    batches = make_batches(3)
    masked = masked_deltas(delta, DROP_RATE, (0,))[0]
    return learn_q(model, fine, start, masked, layers, DROP_RATE, batches[:2], batches[2:], **options)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_learning_lowers_the_held_out_change(family):
    found = learning(family, epochs=15)
    assert found.change < 0.95 * found.history[0][1]
    assert found.change == min(held_out for _, held_out in found.history)
    by_layer = {name: q for name, q in found.q.items() if "query" in name or "q_proj" in name}
    assert all(q >= 0.1 - 1e-6 for q in found.q.values()) and len(set(by_layer.values())) == 2
    if family == "bert":
        name = "bert.encoder.layer.0.attention.self.query"
        assert found.q[f"{name}.bias"] == found.q[f"{name}.weight"]


def test_learning_has_the_right_gradient():
    """Of the output change in one layer's q, against the difference quotient."""
    model, fine, start, delta = pair("bert")
    masked = masked_deltas(delta, DROP_RATE, (0,))[0]
    batch = make_batches(1)[0]
    reference = reference_outputs(model, fine, [batch])[0]
    names = list(flatten_names(delta))

    def change(q):
        by_name = {name: q if "layer.1.output.dense" in name else jnp.float32(0.3) for name in names}
        total, count = output_change_sums(
            model, True, pruned_params(start, masked, by_name), batch, reference
        )
        return total / count

    slope = jax.grad(change)(jnp.float32(0.3))
    quotient = (change(jnp.float32(0.305)) - change(jnp.float32(0.295))) / 0.01
    assert slope != 0 and float(slope) == pytest.approx(float(quotient), rel=0.02)


def test_learning_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = learning("bert", epochs=6)

    class Stop(Exception):
        pass

    def stop(epoch, change, held_out):
        if epoch == 4:
            raise Stop

    checkpoints = Checkpoints(tmp_path / "run", every=1)
    with pytest.raises(Stop):
        learning("bert", epochs=6, checkpoints=checkpoints, on_epoch=stop)
    epochs = []
    again = learning(
        "bert", epochs=6, checkpoints=checkpoints, on_epoch=lambda epoch, *_: epochs.append(epoch)
    )
    assert epochs == [4, 5, 6] and again == whole


def test_learning_ends_without_improvement():
    found = learning("bert", epochs=50, learning_rate=3.0, patience=2)
    best = int(np.argmin([held_out for _, held_out in found.history]))
    assert len(found.history) - 1 == best + 2 < 50
    with pytest.raises(ValueError, match="at least one layer"):
        model, fine, start, delta = pair("bert")
        learn_q(model, fine, start, delta, [], DROP_RATE, make_batches(1), make_batches(1))


# At the terminal.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base and fine-tune of a tiny BERT and a tiny Llama, with tokenizers made on the spot."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("pairs")
    for family in ("bert", "llama"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        config = FAMILIES[family] | {"vocab_size": 259, "max_position_embeddings": 512}
        model, base = init_model(read_model_config(config), jax.random.key(0))
        fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
        for name, params in (("base", base), ("fine", fine)):
            dx.save_params(root / family / name, params, model.config.to_hf())
            fast.save_pretrained(root / family / name)
    (root / "text").write_text("the soup was superb\n\nwe disliked the show\nso it goes\n", encoding="utf-8")
    return root


def darex(*arguments, json_too=True):
    result = CliRunner().invoke(main, [*map(str, arguments), *(["--json"] if json_too else [])])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout) if json_too else result.stdout


WAYS = [
    ("bert", "--objective", "labels", "--masks", 2),
    ("bert", "--objective", "predictions"),
    ("bert", "--objective", "outputs", "--grid", 0.1, 0.5, 0.1),
    ("bert", "--objective", "labels", "--scope", "layer", "--rule", "published"),
    ("bert", "--objective", "learned", "--scope", "layer"),
    ("bert", "--objective", "two-point"),
    ("llama", "--objective", "labels"),
    ("llama", "--objective", "outputs", "--scope", "layer"),
    ("llama", "--objective", "closed-form"),
    ("llama", "--objective", "closed-form", "--scope", "layer"),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way[::2])))
def test_find_q_writes_what_prune_takes(folders, tmp_path, way):
    family, *way = way
    base, fine, q_file = folders / family / "base", folders / family / "fine", tmp_path / "q.json"
    search = ("find-q", base, fine, "-p", 0.9, "--limit", 6, "--out", q_file, *way)
    report = darex(*search)
    assert report == json.loads(q_file.read_text())
    names = set(flatten_names(dx.load_params(fine)))
    values = report["q"].values() if isinstance(report["q"], dict) else [report["q"]]
    assert (set(report["q"]) <= names) if "layer" in way else isinstance(report["q"], float)
    assert all(q > 0 for q in values)
    assert report["labels"] == (6 if "labels" in way else 0) and report["evaluations"] > 0
    if "curve" in report:
        assert q_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    pruned = darex("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", q_file)
    assert pruned["survivors"] > 0
    before = q_file.read_bytes()
    text = darex(*search, json_too=False)
    assert q_file.read_bytes() == before  # the same command, the same file
    assert "passes over 6 examples" in text and f"--q {q_file}" in text


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


def test_learning_does_not_go_on_from_something_else(folders, tmp_path):
    models = folders / "bert" / "base", folders / "bert" / "fine"
    way = ("--objective", "learned", "--scope", "layer", "--limit", 6, "--out", tmp_path / "q.json")
    kept = ("--checkpoints", tmp_path / "run")
    first = darex("find-q", *models, "-p", 0.9, *way, *kept)
    other = darex("find-q", *models, "-p", 0.8, *way, *kept)
    assert other["curve"][0] != first["curve"][0] and min(other["q"].values()) >= 0.2 - 1e-6
    slow = darex("find-q", *models, "-p", 0.9, *way, *kept, "--learning-rate", 1e-3)
    assert slow["curve"][0] == first["curve"][0] and slow["curve"][1] != first["curve"][1]
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert darex("find-q", *models, "-p", 0.9, *way, *kept) == first


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prune_chooses_q_by_what_is_at_hand(folders, tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, fine = folders / family / "base", folders / family / "fine"
    prune = ("prune", base, fine, tmp_path / "delta", "-p", 0.9, "--q", "auto")
    task = {"bert": "opinions", "llama": "word-problems"}[family]
    nothing = darex(*prune)
    assert nothing["q_chosen_by"].startswith("nothing: ")
    assert darex("inspect", tmp_path / "delta")["q"] == [pytest.approx(0.1)]
    texts = darex(*prune, "--text", folders / "text")
    assert "predictions: agreement" in texts["q_chosen_by"] and "on 3 examples" in texts["q_chosen_by"]
    assert darex("inspect", tmp_path / "delta")["q"] == [texts["q"]]
    if family == "bert":  # 500 labelled problems would take a while
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
    from darex_jax.cli.choose import OBJECTIVES as named
    from darex_jax.runs.choose_q import OBJECTIVES as known

    assert list(named) == list(known)


def test_mistakes_are_told(folders, tmp_path):
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"

    def fails(*arguments):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code != 0 and "Traceback" not in result.output
        return result.stderr

    find = ("find-q", base, fine, "-p", 0.9, "--out", tmp_path / "q.json")
    assert "say --scope layer" in fails(*find, "--objective", "learned")
    assert "say --scope model" in fails(*find, "--objective", "two-point", "--scope", "layer")
    assert "texts have no labels" in fails(*find, "--text", folders / "text")
    assert "gsm8k is for decoders" in fails(*find, "--task", "gsm8k")
    assert "from a task or from a text file" in fails(
        *find, "--objective", "outputs", "--task", "sst2", "--text", folders / "text"
    )
    (tmp_path / "empty").write_text("\n")
    assert "has no line of text" in fails(*find, "--objective", "outputs", "--text", tmp_path / "empty")
    assert "there is no q to choose" in fails("find-q", base, fine, "-p", 0.0)
    assert "--task, --data-dir and --text are for --q auto or an objective" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--task", "sst2"
    )
    assert "is a directory; a regular file is needed" in fails(*find[:-1], tmp_path)
    assert "it is a picture" in fails(*find[:-1], tmp_path / "q.png")
    (tmp_path / "other.json").write_text('{"q": 0.02, "drop_rate": 0.99}')
    assert "chosen for a drop rate of 0.99, not of 0.9" in fails(
        "prune", base, fine, tmp_path / "d", "-p", 0.9, "--q", tmp_path / "other.json"
    )
    assert not (tmp_path / "q.json").exists() and not (tmp_path / "d").exists()
