"""darex recommend: its measurements match prune, and its sentences match the numbers."""

import json
import shlex
import shutil
from dataclasses import replace

import numpy as np
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.cli.recommend import _sentences
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names
from darex_jax.runs.recommend import Advice, Facts, Tried


def darex(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_least_loss_is_taken_and_its_command_works(folders, tmp_path):
    base, fine, texts = folders / "bert" / "base", folders / "bert" / "fine", tmp_path / "texts"
    texts.write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    line = ["recommend", base, fine, "--size", "2.5x", "--text", texts, "--steps", 3, "--seed", 5]
    report = darex(*line)
    tried = {(t["method"], *t["options"]): t for t in report["tried"]}
    assert {name for name, *_ in tried} == {"dare", "magnitude", "wanda", "svd", "allocated", "distilled"}
    assert report["chosen"]["loss"] == min(t["loss"] for t in report["tried"])
    assert all(t["file_bytes"] <= report["file_bytes"] for t in report["tried"])
    assert report["held_out"] == 20 and 0 <= report["without_delta"] <= 1
    assert report["measure"] == "agreement of predictions"
    command = shlex.split(report["command"])
    assert command[:2] == ["darex", "prune"] and "--size" in command
    assert command[command.index("--seed") + 1] == "5" and "--difficulty" not in command
    statistics = report["chosen"]["method"] in ("wanda", "allocated")
    assert report["calibration"] == 20 and statistics == ("--limit" in command)
    assert not statistics or command[command.index("--limit") + 1] == "20"
    out = tmp_path / "d"
    steps = ["--steps", "3"] if report["chosen"]["steps"] else []
    made = darex(*[str(out) if word == "OUT" else word for word in command[1:]], *steps)
    assert made["method"] == report["chosen"]["method"]  # with other statistics
    assert abs(made["bytes"] / report["chosen"]["file_bytes"] - 1) < 0.05

    facts = report["facts"]
    with_base, with_fine = (flatten_names(dx.load_params(path)) for path in (base, fine))
    delta = {
        n: np.asarray(with_fine[n]) - np.asarray(with_base[n]) for n in with_base if choose_scope("bert")(n)
    }
    square = sum(float(np.sum(d**2)) for d in delta.values())
    whole = sum(float(np.sum(np.asarray(with_base[n]) ** 2)) for n in delta)
    assert facts["entries"] == sum(d.size for d in delta.values())
    np.testing.assert_allclose(facts["relative"], np.sqrt(square / whole), rtol=1e-5)
    ranks = [np.sum(d**2) / np.linalg.norm(d, 2) ** 2 for d in delta.values() if d.ndim == 2]
    np.testing.assert_allclose(facts["stable_rank"], np.median(ranks), rtol=0.05)
    shown = CliRunner().invoke(main, [*map(str, line), "--can-retrain"])
    assert "loses least" in shown.stdout and "Run it: darex prune" in shown.stdout
    assert "--optimizer adamr" in shown.stdout
    assert set(tmp_path.iterdir()) == {texts, out}


def test_without_texts_only_the_delta_is_measured(folders):
    base, fine = folders / "bert" / "base", folders / "bert" / "fine"
    report = darex("recommend", base, fine, "--size", "3x")
    assert {t["method"] for t in report["tried"]} == {"dare", "magnitude", "svd"}
    assert all(t["loss"] is None for t in report["tried"]) and report["measure"] is None
    assert report["chosen"]["error"] == min(t["error"] for t in report["tried"])
    assert (
        "Without texts the loss of predictions cannot" in report["because"][0]
        and "--text" in report["because"][1]
    )
    refused = CliRunner().invoke(main, list(map(str, ["recommend", base, fine, "--size", "1000x"])))
    assert refused.exit_code == 1 and "at least" in refused.stderr
    both = ["recommend", base, fine, "--size", "3x", "--bytes-per-parameter", 0.1]
    refused = CliRunner().invoke(main, list(map(str, both)))
    assert refused.exit_code == 2 and "pass only one of" in refused.stderr


def test_a_larger_vocabulary_is_in_the_way_only_where_it_is_pruned(folders, tmp_path):
    own = folders / "llama" / "fine"
    params = dx.load_params(own)
    table = params["model"]["embed_tokens"]["weight"]
    params["model"]["embed_tokens"]["weight"] = np.concatenate([table, table[:1]])
    config = json.loads((own / "config.json").read_text()) | {"vocab_size": len(table) + 1}
    dx.save_params(tmp_path / "fine", params, config, companions_from=own)
    line = ["recommend", folders / "llama" / "base", tmp_path / "fine", "--size", "1.3x"]
    assert darex(*line)["chosen"]["method"]
    refused = CliRunner().invoke(main, [*map(str, line), "--include", "embed_tokens"])
    assert refused.exit_code == 1 and "larger vocabulary (model.embed_tokens.weight)" in refused.stderr


def test_outputs_that_are_no_class_are_not_measured(folders, tmp_path):
    models = []
    for name in ("base", "fine"):
        models.append(shutil.copytree(folders / "bert" / name, tmp_path / name))
        config = models[-1] / "config.json"
        several = {"problem_type": "multi_label_classification"}
        config.write_text(json.dumps(json.loads(config.read_text()) | several))
    (tmp_path / "text").write_text("".join(f"{'abc'[i % 3]}{i % 7} some words\n" for i in range(40)))
    report = darex("recommend", *models, "--size", "3x", "--text", tmp_path / "text", "--steps", 3)
    assert report["measure"] is None and all(t["loss"] is None for t in report["tried"])
    assert "without a head of one class or score" in report["because"][0]


def test_the_sentences_match_the_numbers():
    def advice(dare_loss, tail, stable_rank):
        facts = Facts(1000, 0.01, stable_rank, 384.0, tail)
        tried = [
            Tried("dare", {}, 900, 99.0, dare_loss, 0, 1.0),
            Tried("svd", {"bits": 4}, 900, 0.5, 0.02, 0, 1.0),
        ]
        return Advice(facts=facts, tried=tried, chosen=tried[1], without_delta=0.4,
                      measure="agreement of predictions", held_out=200)  # fmt: skip

    def said(*numbers):
        return " ".join(_sentences(advice(*numbers), 900, True, False))

    assert "svd, 4 bits loses least: 2.0%" in said(0.1, 0.2, 100.0)
    assert "another method loses as little" in said(0.02, 0.2, 100.0)
    assert "as little" not in said(0.1, 0.2, 100.0) and "take others" not in said(0.1, 0.2, 100.0)
    same = replace(advice(0.1, 0.2, 100.0), without_delta=0.02)
    assert "do not tell the two models apart" in " ".join(_sentences(same, 900, True, False))
    assert "too large for random dropping" in said(0.3, 0.2, 100.0)
    assert "too large" not in said(0.1, 0.2, 100.0)
    assert "keeping the largest" in said(0.1, 0.6, 5.0) and "low-rank" not in said(0.1, 0.6, 5.0)
    assert "low-rank factors" in said(0.1, 0.2, 5.0) and "low-rank" not in said(0.1, 0.2, 100.0)
