"""The README and docs/: their programs run, their commands exist, their links lead somewhere.

The pages' `darex` lines are taken by the commands' own parsers; those of the README are run, too.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.core.lora import LoraConfig
from darex_jax.core.tree import flatten_names
from darex_jax.models import init_model, read_model_config
from darex_jax.models.lora import add_adapters
from darex_jax.study.rows import read_rows
from darex_jax.study.tables import cell_text
from tests.test_resume import BERT, save_bert, save_llama

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def terminal(page):
    """The `darex` lines of a page's code that is not Python."""
    text = re.sub(r"```python\n.*?```", "", (ROOT / page).read_text(), flags=re.S)
    blocks = re.findall(r"^(?:    |\$ )?(darex .*)$", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in blocks]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages name: two checkpoints and what is made of them."""
    desk = tmp_path_factory.mktemp("desk")
    tokenizer = save_bert(desk / "tokenizer")
    config = BERT | {
        "architectures": ["BertForSequenceClassification"], "hidden_size": 128, "intermediate_size": 512,
        "num_hidden_layers": 4, "id2label": {str(i): f"LABEL_{i}" for i in range(6)},
    }  # fmt: skip
    model, base = init_model(read_model_config(config), jax.random.key(0))
    layers = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query")
    lora = LoraConfig(rank=2, alpha=4.0, targets=layers)
    adapter = jax.tree.map(lambda x: x + 0.01, add_adapters(model, lora, jax.random.key(1))[1])
    dx.save_adapter(desk / "ADAPTER", lora, adapter)
    fine = jax.tree.map(lambda x: x + 0.02 * jnp.sin(200 * x), base)
    for name, params in (("BASE", base), ("FINE", fine)):
        dx.save_params(desk / name, params, model.config.to_hf(), companions_from=tokenizer)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["abe", "bee", "cat", "dog"], 4)) for _ in range(40)]
    (desk / "texts.txt").write_text("\n".join(texts) + "\n")
    rows = [f"{text},{5 if 'cat' in text else 1}" for text in texts]
    (desk / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    (desk / "train.toml").write_text('task = "opinions"\n')
    for name, method in (("delta", "dare"), ("sst2", "svd"), ("mrpc", "magnitude")):
        darex("prune", "BASE", "FINE", f"{name}.safetensors", "--method", method, "-p", "0.9", at=desk)
    darex("export", "delta.safetensors", "patch.safetensors", "--to", "patch", "--base", "BASE", at=desk)
    (desk / "base").symlink_to("BASE")
    save_llama(desk / "LLAMA")
    return desk


@pytest.fixture
def here(desk, tmp_path, monkeypatch):
    """The desk again, where a program may write."""
    for path in desk.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def darex(*arguments, at=None):
    with pytest.MonkeyPatch.context() as patch:
        if at:
            patch.chdir(at)
        done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


# Programs


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)])
def test_the_programs_of_a_page_run(page, here):
    """One after the other, as a reader would type them; then what they should have given."""
    names, after = {}, []
    for i, program in enumerate(programs(page)):
        exec(compile(program, f"{page}, program {i + 1}", "exec"), names)
        after.append(dict(names))
    CHECKS.get(page.removeprefix("docs/"), lambda *_: None)(*after)


def readme(names):
    weights = {n: names[n]["layer"]["weight"] for n in ("base", "fine", "pruned", "with_q", "model")}
    assert 0.005 < (weights["with_q"] != 0).mean() < 0.015
    np.testing.assert_allclose(weights["pruned"] * 0.01, weights["with_q"] * 0.02, rtol=1e-6)
    np.testing.assert_array_equal(weights["model"], weights["base"] + weights["with_q"])
    stored = dx.load_delta("delta.safetensors")["layer"]["weight"]
    np.testing.assert_array_equal(stored, weights["with_q"])


def start(arrays, parts):
    assert 0.005 < (arrays["with_q"]["layer"]["weight"] != 0).mean() < 0.015
    assert (parts["outputs"] - jnp.ones((4, 512)) @ parts["weight"].to_dense().T < 1e-3).all()
    assert (parts["model"]["layer"]["weight"] != parts["base"]["layer"]["weight"]).all()


def shrink(names):
    restored, params = flatten_names(names["restored"]), flatten_names(names["params"])
    assert "classifier.weight" in flatten_names(names["kept"])
    assert names["delta"].keys() == names["parts"].keys()
    for name in flatten_names(names["delta"]):
        np.testing.assert_array_equal(restored[name], params[name])
    again = flatten_names(dx.load_model("MINE")[1])
    assert all((again[name] == leaf).all() for name, leaf in params.items())


def choosing(names):
    assert 0.01 < float(names["q"]) < 1 and names["row_q"].shape == (16,)
    assert ((names["row_q"] >= 0.01) & (names["row_q"] <= 1)).all()


def lora(names):
    merged, factors = flatten_names(names["merged"]), flatten_names(names["factors"])
    assert merged.keys() == factors.keys() and len(merged) == 2
    assert all(0 < (x != 0).mean() < 0.3 for x in merged.values())


def devices(names):
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(names["params"]))
    assert not any(leaf.any() for leaf in jax.tree.leaves(names["pruned"]))  # of a model and itself
    assert names["mesh"].shape["model"] == jax.device_count()


def adamr(step, loop, partition, in_nnx, in_flax, half):
    assert float(step["params"]["head"]["weight"][0, 0]) < 0
    assert step["params"]["body"]["weight"].shape == (8, 8)
    assert (loop["params"]["head"] < 0.1).all()
    assert (loop["params"]["body"] != loop["pretrained"]["body"]).any()
    assert (partition["params"]["head"] != loop["params"]["head"]).all()
    trained = in_nnx["nnx"].state(in_nnx["model"])
    pairs = zip(jax.tree.leaves(in_nnx["start"]), jax.tree.leaves(trained), strict=True)
    assert all((a != b).all() for a, b in pairs)
    assert int(in_flax["train"].step) == 10
    assert (in_flax["train"].params["head"] != in_flax["params"]["head"]).all()
    assert half["trained"]["head"].dtype == jnp.float32
    assert (half["trained"]["head"] != half["params"]["head"]).all()


def small(names):
    first, *_, last = names["found"].looks
    assert last.loss <= first.loss and names["found"].parts[names["name"]].parts[0].values.bits == 4


def merging(names):
    merged, base, model = (names[n]["layer"]["weight"] for n in ("merged", "base", "model"))
    assert 0.4 < float((merged != 0).mean()) < 0.6  # 1 - 0.8 ** 3
    assert (model != base).any()


def many(bank, patch):
    """More of both in test_export.py."""
    labels = bank["alone"].shape[1]
    np.testing.assert_allclose(bank["mixed"][0, :labels], bank["alone"][0], atol=1e-4)
    assert patch["tensors"]


def reader(names):
    """More of it in test_format2.py."""
    ours = flatten_names(dx.load_delta("delta.safetensors"))
    theirs = names["read_delta"]("delta.safetensors")
    assert all((theirs[name] == leaf).all() for name, leaf in ours.items())


CHECKS = {
    "README.md": readme, "start.md": start, "shrink.md": shrink, "choosing_q.md": choosing, "lora.md": lora,
    "devices.md": devices, "adamr.md": adamr, "small.md": small, "merging.md": merging, "many.md": many,
    "format.md": reader,
}  # fmt: skip


# Commands


@pytest.mark.parametrize("page", [page for page in PAGES if terminal(page)])
def test_every_command_of_a_page_is_taken(page, here):
    """By the command's own parser: arguments, options and values."""
    with click.Context(main, info_name="darex") as context:
        for words in terminal(page):
            command = main.get_command(context, words[0])
            assert command, f"{page}: no command {words[0]}"
            try:
                command.make_context(words[0], words[1:], parent=context)
            except click.UsageError as error:
                pytest.fail(f"{page}: darex {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES)
def test_every_option_in_the_text_exists(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    options = {o for c in main.commands.values() for p in c.params for o in [*p.opts, *p.secondary_opts]}
    others = {"--no-deps", "--p", "--help", "--peers"}  # of pip, the authors' code, click, benchmarks
    for code in re.findall(r"`([^`\n]+)`", text):
        of = re.match(r"(?:darex )?([a-z-]+)", code)
        command = main.commands.get(of[1]) if of and (code.startswith("darex ") or " --" in code) else None
        if code.startswith("darex "):
            assert command, f"{page}: `{code}`"
        taken = [o for p in command.params for o in [*p.opts, *p.secondary_opts]] if command else options
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            assert option in taken or option in others, f"{page}: `{code}`"


def test_the_commands_of_the_readme_run(here):
    lines = terminal("README.md")
    assert len(lines) == 6
    (here / "delta.safetensors").unlink()
    said = {words[0]: darex(*words) for words in lines}
    whole, file = Path("FINE/model.safetensors").stat().st_size, Path("delta.safetensors").stat().st_size
    assert 90 * file < whole and "ok" in said["verify"] and "accuracy" in said["eval"]
    assert (here / "RESTORED" / "config.json").exists()


# The site


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    for page in pages:  # nothing is loaded from elsewhere
        text = page.read_text()
        assert not re.search(r'(?:src=|<link[^>]*href=|url\()["\']?https?:', text), page
        assert "Args:" not in text and "Raises:" not in text, page  # docstrings' sections are laid out
    assert (tmp_path / "site/reference/algebra.html").read_text().count('class="doc doc-object') > 10
    # The README's pictures and links are files of the repository as well.
    for link in re.findall(r"\]\(([^):#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    for page in PAGES[1:]:
        assert f": {page.removeprefix('docs/')}\n" in listed, page


def test_every_public_name_is_in_the_reference():
    named = [
        name
        for page in (ROOT / "docs/reference").glob("*.md")
        for name in re.findall(r"^::: darex_jax\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(named) == sorted(dx.__all__)


FIGURE = re.compile(r"-?\d\.\d{3}(?: ± \d\.\d{3})?(?![\d.])|\d+\.\d% ± \d+\.\d%")  # of a metric


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/benchmarks.md"])
def test_every_figure_of_a_table_is_one_of_a_study(page):
    """A number that no page of results shows is of rows that were measured again."""
    results = (ROOT / "experiments/results/small").glob("*.md")
    shown = [figure for path in results for figure in FIGURE.findall(path.read_text())]
    means = {figure.partition(" ± ")[0] for figure in shown}
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    stale = {figure for row in rows for figure in FIGURE.findall(row)} - {*shown, *means}
    assert not stale


def test_the_figures_of_the_readme_are_those_of_the_table():
    """At 0.005 bytes per parameter: over the seeds of the study frontier, else of methods."""
    folder = ROOT / "experiments/results/small"
    of_study = [read_rows(folder / f"{study}.jsonl") for study in ("methods", "frontier")]
    shown = re.findall(r"^\| ([^|:]+?)(?:, 91 MB|: [^|]+)? \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
                       (ROOT / "README.md").read_text(), re.M)[2:]  # fmt: skip
    assert [method for method, *_ in shown] == ["fine-tuned", "DARE", "DAREx-q", "SVD, 4 bits", "distilled"]
    for column, task in enumerate(("sst2", "mrpc", "stsb"), 1):
        cells = {}
        for rows in of_study:
            own = [row for row in rows if row["fine_tune"].startswith(f"{task}/adamw/")]
            for way in {row["way"] for row in own}:
                measured = [row for row in own if row["way"] == way and row["at"] in (None, 0.005)]
                cells[way] = cell_text(measured).partition(" (")[0]
        for row in shown:
            assert row[column] == cells[row[0]], (task, row[0])
