"""The programs in the README and in docs/ run as they stand."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parent.parent


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def run_program_with(text):
    """The variables of the README's one program that has this text in it."""
    (program,) = (p for p in programs("README.md") if text in p)
    names: dict = {}
    exec(program, names)
    return names


def test_pruning():
    names = run_program_with("dx.prune(jax.random.key(0), delta")
    kept = (names["gentler"]["layer"]["weight"] != 0).mean()
    assert 0.005 < kept < 0.015


def test_parts():
    before = run_program_with("dx.prune(jax.random.key(0), delta")
    (program,) = (p for p in programs("README.md") if "dx.svd(delta" in p)
    exec(program, before)  # it goes on from there
    dense = before["weight"].to_dense()
    assert (before["outputs"] - jnp.ones((4, 512)) @ dense.T < 1e-3).all()
    assert (before["model"]["layer"]["weight"] != before["base"]["layer"]["weight"]).all()


def test_adamr():
    names = run_program_with("dx.adamr")
    assert float(names["params"]["head"]["weight"][0, 0]) < 0 and names["params"]["body"]["weight"].shape == (
        8,
        8,
    )


def test_the_page_on_adamr():
    """One program after the other, as a reader would type them."""
    loop, partition, in_nnx, in_flax, half = programs("docs/adamr.md")
    names: dict = {}
    exec(loop, names)
    head = names["params"]["head"]
    assert (head < 0.1).all() and (names["params"]["body"] != names["pretrained"]["body"]).any()
    exec(partition, names)
    assert (names["params"]["head"] != head).all()
    exec(in_nnx, names)
    assert all((a != b).all() for a, b in zip(
        jax.tree.leaves(names["start"]), jax.tree.leaves(names["nnx"].state(names["model"])), strict=True
    ))  # fmt: skip
    exec(in_flax, names)
    assert int(names["train"].step) == 10
    assert (names["train"].params["head"] != names["params"]["head"]).all()
    exec(half, names)
    trained, params = names["trained"], names["params"]
    assert trained["head"].dtype == jnp.float32 and (trained["head"] != params["head"]).all()


def test_the_page_on_small_files():
    (program,) = programs("docs/small.md")
    names: dict = {}
    exec(program, names)
    first, *_, last = names["found"].looks
    assert last.loss <= first.loss and names["found"].parts[names["name"]].parts[0].values.bits == 4


def test_the_page_on_merging():
    (program,) = programs("docs/merging.md")
    names: dict = {}
    exec(program, names)
    merged, base, model = (names[n]["layer"]["weight"] for n in ("merged", "base", "model"))
    assert 0.4 < float((merged != 0).mean()) < 0.6  # 1 - 0.8 ** 3
    assert (model != base).any()


def test_every_page_is_run():
    pages = {page.name for page in (ROOT / "docs").glob("*.md") if programs(page)}
    elsewhere = {"format.md", "many.md"}  # in test_format2.py and test_export.py
    assert pages == {"adamr.md", "small.md", "merging.md"} | elsewhere
