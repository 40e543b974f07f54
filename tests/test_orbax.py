"""Orbax checkpoints as base, fine-tuned model and output: the same bits as with safetensors."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import darex_jax as dx
from darex_jax.core.errors import FileError
from darex_jax.core.sharding import make_mesh
from darex_jax.core.tree import flatten_names, unflatten_names
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.orbax import OrbaxFile
from darex_jax.files.safetensors import CHUNK
from tests.test_bank import darex
from tests.test_resume import save_bert


def tree(seed, dtype=jnp.float32):
    """A model with Flax names: kernels [in, out], blocks in a list."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    blocks = [{"kernel": leaf(24, 16), "bias": leaf(16)} for _ in range(2)]
    return {"layers": blocks, "embedder": {"embedding": leaf(40, 24)}, "scale": leaf()}


def save(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def safetensors(path, state):
    dx.save_params(path, unflatten_names(named(state)))
    return path


def named(state):
    """Leaves by name, with list indices in names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in p): x for p, x in leaves}


def same(a, b):
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[name]), name)
        assert leaf.dtype == b[name].dtype, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_the_artifact_is_that_of_the_same_tree_in_safetensors(tmp_path, dtype, method):
    states = {"base": tree(0, dtype), "fine": tree(1, dtype)}
    for kind, write in (("orbax", save), ("safetensors", safetensors)):
        for name, state in states.items():
            write(tmp_path / f"{name}.{kind}", state)
        pair = tmp_path / f"base.{kind}", tmp_path / f"fine.{kind}"
        darex("prune", *pair, tmp_path / f"delta.{kind}", "--method", method, "-p", 0.5)
    assert (tmp_path / "delta.orbax").read_bytes() == (tmp_path / "delta.safetensors").read_bytes()
    delta = tmp_path / "delta.orbax"
    assert set(flatten_names(dx.load_delta(delta))) == {"layers.0.kernel", "layers.1.kernel"}
    darex("verify", delta, "--base", tmp_path / "base.orbax")
    for out, options in (("out", ()), ("again", ("--to", "safetensors"))):
        darex("apply", tmp_path / "base.orbax", delta, tmp_path / out, *options)
    darex("apply", tmp_path / "base.safetensors", delta, tmp_path / "third", "--to", "orbax")
    with Checkpoint(tmp_path / "out") as out, Checkpoint(tmp_path / "again") as again:
        assert out.is_orbax and not again.is_orbax
    for other in ("again", "third"):
        same(dx.load_params(tmp_path / "out"), dx.load_params(tmp_path / other))
    # Plain orbax reads it.
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore((tmp_path / "out").resolve())
    same(theirs, dx.load_params(tmp_path / "again"))
    dense = flatten_names(dx.load_delta(delta))["layers.0.kernel"]
    expected = np.asarray(states["base"]["layers"][0]["kernel"], np.float32) + np.asarray(dense)
    np.testing.assert_array_equal(np.asarray(theirs["layers"]["0"]["kernel"]), expected.astype(dtype))


def test_every_way_that_trees_are_saved(tmp_path):
    state, moved = tree(0), tree(1)
    plain = unflatten_names(named(state))
    for name, ocdbt, zarr3 in (("old", False, False), ("zarr3", True, True), ("alone", False, True)):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as checkpointer:
            checkpointer.save(tmp_path / name, args=ocp.args.PyTreeSave(state))
        same(dx.load_params(tmp_path / name), plain)

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step, at_step in ((5, moved), (10, state)):
            manager.save(step, args=ocp.args.StandardSave(at_step))
    same(dx.load_params(tmp_path / "run"), plain)  # the newest
    same(dx.load_params(tmp_path / "run" / "5"), unflatten_names(named(moved)))

    trained = TrainState.create(apply_fn=print, params=state, tx=optax.adam(1e-3))
    save(tmp_path / "train", trained)
    same(dx.load_params(tmp_path / "train"), plain)
    save(tmp_path / "two", {"params": moved, "ema": {"params": state}, "step": 3})
    same(dx.load_params(tmp_path / "two"), unflatten_names(named(moved)))
    same(dx.load_params(f"{tmp_path / 'two'}#ema.params"), plain)

    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(4, 3, rngs=nnx.Rngs(i)) for i in range(2)])

    net = nnx.state(Net())
    save(tmp_path / "nnx", net)
    names = {f"layers.{i}.{leaf}" for i in range(2) for leaf in ("kernel", "bias")}
    assert set(flatten_names(dx.load_params(tmp_path / "nnx"))) == names


def test_a_branch_is_selected_and_other_names_are_mapped(tmp_path, monkeypatch):
    save(tmp_path / "base", {"ema": tree(0), "params": tree(2)})
    save(tmp_path / "fine", {"ema": tree(1), "params": tree(2)})
    pair = tmp_path / "base", tmp_path / "fine"
    darex("prune", *pair, tmp_path / "delta", "-p", 0.5, "--params", "ema")
    assert (
        "fingerprint"
        in darex("apply", tmp_path / "base", tmp_path / "delta", tmp_path / "o", "--params", "ema").output
    )
    wrong = darex("apply", tmp_path / "base", tmp_path / "delta", tmp_path / "p", code=1)
    assert "does not" in wrong.output or "differs" in wrong.output or "not the" in wrong.output
    from darex_jax.runs import evidence

    def gather(base, fine, *given, **more):
        raise dx.DarexError(f"{base}|{fine}")

    monkeypatch.setattr(evidence, "gather", gather)
    line = ("prune", *pair, tmp_path / "wanda", "--method", "wanda", "-p", 0.5, "--task", "opinions")
    told = darex(*line, "--params", "ema", code=1).output.replace("\n", "")
    assert "base#ema|" in told and "fine#ema" in told
    missing = darex("check", *pair, "--params", "teacher", code=1)
    assert "has no array under 'teacher'; it has ema, params" in " ".join(missing.output.split())

    other = {
        "model": {"blocks": tree(1)["layers"], "embedder": tree(1)["embedder"], "scale": tree(1)["scale"]}
    }
    safetensors(tmp_path / "named", other)
    assert darex("check", f"{tmp_path / 'base'}#ema", tmp_path / "named", code=1).exit_code == 1
    options = ("--rename", r"^model\.(blocks\b)?=", "--json")
    assert json.loads(
        darex("check", f"{tmp_path / 'base'}#ema", tmp_path / "named", *options, code=1).output
    )["faults"]
    safetensors(tmp_path / "close", {"model": tree(1)})
    report = darex(
        "check", f"{tmp_path / 'base'}#ema", tmp_path / "close", "--rename", r"^model\.=", "--json"
    )
    assert json.loads(report.output)["pruned"]["parameters"] == 2
    mixed = tmp_path / "mixed"
    darex("prune", f"{tmp_path / 'base'}#ema", tmp_path / "close", mixed, "-p", 0.5, "--rename", r"^model\.=")
    assert set(flatten_names(dx.load_delta(mixed))) == {f"model.layers.{i}.kernel" for i in range(2)}
    darex("apply", f"{tmp_path / 'base'}#ema", mixed, tmp_path / "restored")
    assert set(flatten_names(dx.load_params(tmp_path / "restored"))) == set(named({"model": tree(1)}))
    assert "REGEX=NAME" in darex("check", *pair, "--rename", "nothing", code=2).output
    assert "NAME is plain text" in darex("check", *pair, "--rename", r"(layers)=\1", code=2).output


def test_an_orbax_model_is_loaded_on_a_mesh_and_evaluated(tmp_path):
    base = save_bert(tmp_path / "base")
    fine = tmp_path / "fine"
    darex("train", base, fine, "--steps", 2, "--batch-size", 8, "--limit", 16, "--validation-limit", 8)
    darex("prune", base, fine, tmp_path / "delta", "-p", 0.5)
    darex("apply", base, tmp_path / "delta", tmp_path / "orbax", "--to", "orbax")
    darex("apply", base, tmp_path / "delta", tmp_path / "plain")
    scores = [
        json.loads(darex("eval", tmp_path / kind, "--limit", 20, "--json").stdout)["metric"]
        for kind in ("orbax", "plain")
    ]
    assert scores[0] == scores[1]
    branch = darex("eval", f"{tmp_path / 'orbax'}#bert", "--limit", 20, code=1)  # the tokenizer is found
    assert "does not match" in branch.output
    mesh = make_mesh(2, 4)
    split = dx.load_params(tmp_path / "orbax", mesh=mesh)
    same(split, dx.load_params(tmp_path / "plain"))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split))


@pytest.mark.parametrize("sharded", [False, True])
def test_long_arrays_are_read_in_pieces(tmp_path, sharded):
    """Of the length that all readers of two files at a time count on, whatever was stored."""
    long = {"a": np.arange(2 * CHUNK + 8, dtype=np.float32), "b": np.arange(8 * (CHUNK // 3)).reshape(8, -1)}
    state: Any = long
    if sharded:
        rows = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
        state = {name: jax.device_put(array, rows) for name, array in long.items()}
    save(tmp_path / "c", state)
    with Checkpoint(tmp_path / "c") as checkpoint:
        for name, array in long.items():
            pieces = [piece.copy() for piece in checkpoint.tensors[name].chunks()]
            assert {len(piece) for piece in pieces[:-1]} <= {CHUNK} and len(pieces[-1]) <= CHUNK
            np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
        part = checkpoint.files["model.safetensors"].read_part(
            checkpoint.tensors["b"].info, (slice(1, 3), slice(2, 9))
        )
        np.testing.assert_array_equal(part, long["b"][1:3, 2:9])


def test_what_is_stored_as_one_chunk_is_decoded_once(tmp_path, monkeypatch):
    base = {"layers": [{"w": np.zeros((3 * CHUNK // 4, 4), np.float32)} for _ in range(2)]}
    fine = {"layers": [{"w": np.ones((3 * CHUNK // 4, 4), np.float32)} for _ in range(2)]}
    paths = save(tmp_path / "base", base), save(tmp_path / "fine", fine)
    reads = []
    whole = OrbaxFile._read
    monkeypatch.setattr(OrbaxFile, "_read", lambda *given: reads.append(given) or whole(*given))
    darex("prune", *paths, tmp_path / "delta", "-p", 0.999)
    assert len(reads) == 4


def test_damage_is_reported_in_one_line(tmp_path):
    whole = save(tmp_path / "c", {"layers": {str(i): {"kernel": np.random.rand(64, 64)} for i in range(2)}})
    for number, target in enumerate(
        sorted(p for p in whole.rglob("*") if p.is_file() and p.stat().st_size > 40)
    ):
        for change in ("cut", "gone", "bytes"):
            copy = tmp_path / f"{number}-{change}"
            shutil.copytree(whole, copy)
            file = copy / target.relative_to(whole)
            content = file.read_bytes()
            if change == "gone":
                file.unlink()
            else:
                file.write_bytes(
                    content[: len(content) // 2] if change == "cut" else content[:-9] + b"\0" * 9
                )
            try:
                found = flatten_names(dx.load_params(copy))
            except FileError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
            else:  # other files of orbax are not read
                same(unflatten_names(found), dx.load_params(whole))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "chunks", args=ocp.args.PyTreeSave({"w": np.ones((64, 64))}))
    next(p for p in (tmp_path / "chunks" / "w").iterdir() if not p.name.startswith(".")).unlink()
    with pytest.raises(FileError, match=r"'w' cannot be read"):  # missing data must not be read as zeros
        dx.load_params(tmp_path / "chunks")
    forged = next((tmp_path / "chunks").rglob(".zarray"))
    layout = json.loads(forged.read_text())
    # A tensorstore that cannot allocate ends the process.
    for shape, chunks in (([10**11, 8], [10**11, 8]), ([64, 64], [10**11, 64])):
        forged.write_text(json.dumps(layout | {"shape": shape, "chunks": chunks}))
        with pytest.raises(FileError, match=r"'w' claims .* bytes, its files have"):
            dx.load_params(tmp_path / "chunks")
    save(tmp_path / "outside", {"a": np.ones(3)})
    metadata = tmp_path / "outside" / "_METADATA"
    metadata.write_text(metadata.read_text().replace('"key": "a"', '"key": "../c/layers.0.kernel"'))
    with pytest.raises(FileError, match=r"it has an array called '\.\./c"):
        dx.load_params(tmp_path / "outside")
    odd = save(tmp_path / "a#b?c%41", {"w": np.ones(3)})
    assert dx.load_params(odd)["w"].shape == (3,)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"has neither .* and is not an orbax checkpoint"):
        dx.load_params(tmp_path / "empty")
    dx.save_params(tmp_path / "plain", {"a": jnp.zeros(2)})
    with pytest.raises(FileError, match=r"is not an orbax checkpoint"):
        dx.load_params(f"{tmp_path / 'plain'}#params")
