"""The demo and the model commands on MiniLM's real weights, with few examples."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.files.manifest import params_digest
from darex_jax.runs.demo import PACKAGE, demo_weights
from darex_jax.tasks import load_task

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the demo's weights are not installed"
)


def darex(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@needs_weights
def test_demo_in_miniature(tmp_path):
    options = ("--out", tmp_path, "--steps", 2, "--limit", 16, "-p", 0.9, "-p", 0.99, "--json")
    results = json.loads(darex("demo", *options))
    assert [row["drop_rate"] for row in results["rates"]] == [0.9, 0.99]
    for row in results["rates"]:
        assert row["restored_bit_identical"]
        assert row["artifact_bytes"] < results["fine_bytes"] * 1.1 * (1 - row["drop_rate"]) + 100_000
    assert (tmp_path / "metric_by_q.png").read_bytes().startswith(b"\x89PNG")
    fine = tmp_path / "fine-tuned"
    evaluated = json.loads(darex("eval", fine, "--limit", 16, "--json"))
    assert evaluated["metric"] == results["fine_tuned"] and evaluated["n"] == 16
    q_file = tmp_path / "q.json"
    search = ("--drop-rate", 0.9, "--task", "opinions", "--limit", 16, "--out", q_file, "--json")
    found = json.loads(darex("find-q", demo_weights(), fine, *search))
    assert found["q"] == next(r for r in results["rates"] if r["drop_rate"] == 0.9)["q_v"]["q"]
    darex("prune", demo_weights(), fine, tmp_path / "d", "-p", 0.9, "--q", q_file)
    assert json.loads(darex("inspect", tmp_path / "d", "--json"))["q"] == [found["q"]]


@needs_weights
def test_train_writes_what_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    few = ("--steps", 2, "--limit", 64, "--validation-limit", 16, "--json")
    report = json.loads(darex("train", demo_weights(), tmp_path / "m", *few))
    assert report["steps"] == 2 and report["test_examples"] == 1000
    again = json.loads(darex("train", demo_weights(), tmp_path / "n", *few))
    assert again["loss"] == report["loss"]
    manifests = [json.loads((tmp_path / name / "darex_manifest.json").read_text()) for name in "mn"]
    assert manifests[0] == manifests[1]  # the output's digest too: a repeat gives the same bits
    assert manifests[0]["options"]["steps"] == 2 and manifests[0]["versions"]["jax"]
    params = dx.load_params(tmp_path / "m")
    assert manifests[0]["outputs"]["model"] == params_digest(params)
    evaluated = json.loads(darex("eval", tmp_path / "m", "--limit", 16, "--json"))
    assert evaluated["manifest"]["inputs"]["model"] == manifests[0]["outputs"]["model"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert loaded.config.num_labels == 2


def test_a_base_that_the_demo_would_replace_is_refused(folders, tmp_path):
    base = tmp_path / "fine-tuned"
    shutil.copytree(folders / "bert" / "base", base)
    before = (base / "model.safetensors").read_bytes()
    result = CliRunner().invoke(main, ["demo", "--base", str(base), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "would replace" in result.stderr
    assert (base / "model.safetensors").read_bytes() == before


@needs_weights
def test_a_model_of_another_task_is_explained(tmp_path):
    result = CliRunner().invoke(main, ["eval", str(demo_weights()), "--limit", "8"])
    assert result.exit_code == 1 and "no classification head; fine-tune it first" in result.stderr
    logits, labels = np.zeros((4, 3)), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match="'opinions' has 2 outputs, this model has 3"):
        load_task("opinions").metric(logits, labels)
