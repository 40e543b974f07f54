"""Format 2 for every method: restored bits, digests, damage, size, determinism."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.core.scope import choose_scope
from darex_jax.core.tree import flatten_names
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import Checkpoint
from darex_jax.files.prune import Job
from darex_jax.files.restore import apply_artifact, restored_params, verify_artifact
from darex_jax.files.safetensors import FileError, SafetensorsFile
from darex_jax.methods.budget import Budget
from darex_jax.methods.evidence import Evidence
from darex_jax.methods.table import METHODS
from darex_jax.parts.rounding import rounded
from darex_jax.parts.total import Parts
from darex_jax.runs.prune import prune_by
from tests.pairs import BF16, darex, encoder, read_all, write

EVIDENCE = Evidence(
    input_norms={"bert.pooler.dense.weight": np.linspace(1, 2, 16).astype(np.float32)},
    second_moments={"bert.pooler.dense.weight": np.diag(np.linspace(1, 2, 16))},
    curvature={"bert.pooler.dense.weight": 0.5},
    train=lambda parts, bits: {name: rounded(each, bits) for name, each in parts.items()},
)


def prune(base, fine, out, method, drop_rate=0.75, file_bytes=None, **options):
    with Checkpoint(base) as b, Checkpoint(fine) as f:
        job = Job(b, f, out, choose_scope("bert"))
        return prune_by(
            job, method, file_bytes or Budget(drop_rate=drop_rate), gathered=(EVIDENCE, {}), **options
        )


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("method", list(METHODS))
def test_restored_model_is_base_plus_the_loaded_delta(tmp_path, method, dtype):
    base, fine = encoder(0, dtype, prefix="", head=False), encoder(1, dtype)
    paths = write(tmp_path / "base", base), write(tmp_path / "fine", fine, {"num_labels": 2})
    prune(*paths, tmp_path / "d", method)
    with Checkpoint(paths[0]) as b, DeltaFile(tmp_path / "d") as d:
        apply_artifact(b, d, tmp_path / "out")
        in_memory = dict(restored_params(b, d))
        assert verify_artifact(d, b)["base"] == "ok"
        assert d.recipe.format == 2 and d.recipe.method == method
    restored = read_all(tmp_path / "out")
    assert restored.keys() == fine.keys() == in_memory.keys()
    assert all(in_memory[name].tobytes() == restored[name].tobytes() for name in restored)
    delta = flatten_names(dx.load_delta(tmp_path / "d"))
    assert delta.keys() == {n for n in fine if n.startswith("bert.") and fine[n].dtype == dtype}
    own = {name: jnp.asarray(base[name.removeprefix("bert.")]) for name in delta}
    for name, leaf in dx.apply_delta(own, delta).items():
        assert restored[name].tobytes() == np.asarray(leaf).tobytes(), name
    np.testing.assert_array_equal(restored["classifier.weight"], fine["classifier.weight"])
    assert any(np.any(np.asarray(leaf)) for leaf in delta.values())


@pytest.mark.parametrize("method", list(METHODS))
def test_parts_are_leaves(tmp_path, pair, method):
    """`load_delta(parts=True)` is the same delta, and `apply_delta` accepts it."""
    prune(*pair, tmp_path / "d", method)
    dense = flatten_names(dx.load_delta(tmp_path / "d"))
    parts = dx.load_delta(tmp_path / "d", parts=True)
    named = dict(
        zip(dense, jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, Parts)), strict=True)
    )  # in the order of a sorted dict
    for name, leaf in dense.items():
        np.testing.assert_allclose(named[name].to_dense(), leaf, rtol=1e-5, atol=1e-9)
    base = dx.load_params(pair[0])
    base = {"bert": {k: v for k, v in base.items() if k in parts["bert"]}}
    one = dx.apply_delta(base, parts)
    other = jax.jit(dx.apply_delta)(base, dx.load_delta(tmp_path / "d"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_float64_models_have_a_float32_delta_added_in_float64(tmp_path):
    base = encoder(0, np.float64, prefix="", head=False)
    fine = {f"bert.{name}": x * (1 + 2.0**-30) for name, x in base.items() if x.dtype == np.float64}
    paths = write(tmp_path / "base", base), write(tmp_path / "fine", fine)
    names = list(prune(*paths, tmp_path / "d", "magnitude").recipe.parameters)
    with Checkpoint(paths[0]) as b, DeltaFile(tmp_path / "d") as d:
        restored = dict(restored_params(b, d))
    delta = flatten_names(dx.load_delta(tmp_path / "d"))
    for name in names:
        own = base[name.removeprefix("bert.")]
        exact = (fine[name] - own).astype(np.float32)
        added = np.asarray(delta[name])
        np.testing.assert_allclose(added[added != 0], exact[added != 0], rtol=2.0**-8)  # bfloat16's
        np.testing.assert_array_equal(restored[name], own + added)
    assert any(np.any(np.asarray(leaf)) for leaf in delta.values())


@pytest.mark.parametrize("method", ["magnitude", "structured"])
def test_same_arguments_same_bytes(tmp_path, pair, method):
    """Also if JAX makes keys of another kind by default: a seed is one of a Threefry key."""
    for name, kind in (("a", "threefry2x32"), ("b", "rbg")):
        with jax.default_prng_impl(kind):
            prune(*pair, tmp_path / name, method)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 1}, {"q": 0.5}, {"dtype": "bfloat16"}])
def test_dare_with_few_bits(tmp_path, pair, options):
    """The survivors are those of `dx.prune`, with similar values."""
    prune(*pair, tmp_path / "d", "dare", options=options)
    delta = flatten_names(dx.load_delta(tmp_path / "d"))
    fine, base = read_all(pair[1]), read_all(pair[0])
    exact = {n: jnp.asarray(fine[n] - base[n.removeprefix("bert.")]) for n in delta}
    expected = dx.prune(jax.random.key(0), exact, 0.75, options.get("q"))
    for name, leaf in delta.items():
        assert options == {"bits": 4} or np.array_equal(leaf != 0, expected[name] != 0)
        near = {4: 0.25, 1: 1.0, None: 1e-2}[options.get("bits")]
        assert float(jnp.linalg.norm(leaf - expected[name])) <= near * float(jnp.linalg.norm(expected[name]))


def test_a_file_of_the_requested_size(tmp_path, pair):
    for method in ("magnitude", "svd", "dare"):
        for size in (3200, 3600):
            summary = prune(*pair, tmp_path / "d", method, file_bytes=size)
            assert (tmp_path / "d").stat().st_size == summary.file_bytes <= size
            verify(tmp_path / "d")
    with pytest.raises(DarexError, match="bytes, 700 were requested"):
        prune(*pair, tmp_path / "small", "magnitude", file_bytes=700)
    assert not (tmp_path / "small").exists()


def verify(path):
    with DeltaFile(path) as d:
        return verify_artifact(d)


def test_many_equal_tensors(tmp_path):
    """Their recipe compresses better than a reader believes; what it claims beyond that is padded."""
    expert = np.ones((4, 4), np.float32)
    names = [f"encoder.layer.{i}.expert.{e}.weight" for i in range(8) for e in range(128)]
    base = write(tmp_path / "base", dict.fromkeys(names, expert))
    fine = write(tmp_path / "fine", {name: expert + (i == 5) for i, name in enumerate(names)})
    prune(base, fine, tmp_path / "d", "magnitude")
    with DeltaFile(tmp_path / "d") as d:
        text, stored = len(d.recipe.to_json()), d.tensors["recipe"].size
        assert len(zstandard.ZstdCompressor(level=19).compress(d.recipe.to_json().encode())) < stored
        assert text / 65 < stored < text / 60
    darex("verify", tmp_path / "d", "--base", base)


def test_wanda_reports_missing_evidence(tmp_path, pair):
    with Checkpoint(pair[0]) as b, Checkpoint(pair[1]) as f, pytest.raises(DarexError, match="input norms"):
        prune_by(Job(b, f, tmp_path / "d", choose_scope("bert")), "wanda", Budget(drop_rate=0.5))


def test_another_base_is_named(tmp_path, pair):
    prune(*pair, tmp_path / "d", "magnitude")
    other = encoder(0, prefix="", head=False)
    other["pooler.dense.weight"] = other["pooler.dense.weight"] + np.float32(1e-3)
    write(tmp_path / "other", other)
    with (
        Checkpoint(tmp_path / "other") as b,
        DeltaFile(tmp_path / "d") as d,
        pytest.raises(FileError) as error,
    ):
        apply_artifact(b, d, tmp_path / "out")
    assert "'pooler.dense.weight' has other values" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_every_truncation_and_many_flipped_bits_are_refused(tmp_path, pair, method):
    prune(*pair, tmp_path / "d", method)
    good, rng = (tmp_path / "d").read_bytes(), np.random.default_rng(0)
    expected = {n: np.asarray(x) for n, x in flatten_names(dx.load_delta(tmp_path / "d")).items()}
    for trial in range(60):
        data = bytearray(good)
        if trial % 3 == 0:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "bad").write_bytes(data)
        try:
            found = flatten_names(dx.load_delta(tmp_path / "bad"))
        except FileError as error:
            assert str(tmp_path / "bad") in str(error)
            continue
        assert found.keys() == expected.keys()  # e.g. a bit of the header's padding
        assert all(np.array_equal(found[n], expected[n]) for n in expected)


def forge(path, source, change):
    """A file with a changed recipe and updated digests."""
    import blake3

    from darex_jax.files.recipe import canonical_json
    from darex_jax.files.safetensors import write_tensors

    with SafetensorsFile(source) as file:
        tensors = {name: file.read(name) for name in file.tensors}
        metadata = dict(file.metadata)
    table = json.loads(zstandard.ZstdDecompressor().decompress(tensors["recipe"].tobytes()))
    change(table)
    text = canonical_json(table).encode()
    metadata["blake3"] = blake3.blake3(text).hexdigest()
    tensors["recipe"] = np.frombuffer(zstandard.ZstdCompressor().compress(text), np.uint8)
    write_tensors(path, tensors, metadata)


WORD = "bert.embeddings.word_embeddings.weight"


def part(table):
    return table["blocks"][0]["parameters"][WORD][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: part(t).update(kind="dense"),
        lambda t: part(t).update(kind="unknown"),
        lambda t: part(t).update(q=0),
        lambda t: part(t).update(q="1"),
        lambda t: part(t)["counts"].update(positions=["U32", 10**12]),
        lambda t: part(t)["counts"].update(values=["BF16", -1]),
        lambda t: part(t)["counts"].pop("values"),
        lambda t: t["blocks"][0].update(bytes=1),
        lambda t: t["blocks"][0]["streams"][0].__setitem__(3, 2**40),
        lambda t: t["blocks"][0]["streams"][0].__setitem__(1, "raw"),
        lambda t: t["blocks"][0]["streams"][0].__setitem__(2, "F64"),
        lambda t: t["blocks"][0]["streams"].append(["sparse values BF16", "raw", "BF16", 0, 0]),
        lambda t: t["blocks"][0]["parameters"].update({WORD: [part(t)] * 17}),
        lambda t: t["parameters"][WORD].update(shape=[2**23, 2**23]),
        lambda t: t["parameters"].pop(WORD),
        lambda t: t.update(blocks=[]),
        lambda t: t.update(blocks=[1]),
        lambda t: t.update(blocks=1),
        lambda t: t.update(base_blake3="0"),
        lambda t: t.update(options={"a": [[]]}),
        lambda t: t.update(budget={"a": {"b": {}}}),
    ],
)
def test_forged_recipes_are_refused(tmp_path, pair, change):
    prune(*pair, tmp_path / "d", "magnitude")
    forge(tmp_path / "forged", tmp_path / "d", change)
    with pytest.raises(FileError):
        dx.load_delta(tmp_path / "forged")


def test_a_forged_fingerprint_is_refused(tmp_path, pair):
    prune(*pair, tmp_path / "d", "magnitude")
    forge(tmp_path / "forged", tmp_path / "d", lambda t: t.update(base_blake3="0" * 64))
    with Checkpoint(pair[0]) as b, DeltaFile(tmp_path / "forged") as d, pytest.raises(FileError) as error:
        apply_artifact(b, d, tmp_path / "out")
    assert "fingerprint" in str(error.value)


def test_any_safetensors_reader_opens_it(tmp_path, pair):
    theirs = pytest.importorskip("safetensors.numpy")
    prune(*pair, tmp_path / "d", "magnitude")
    assert {"parts", "recipe", "dense/classifier.weight"} <= theirs.load_file(tmp_path / "d").keys()


def test_command_line_reads_it(tmp_path, pair):
    prune(*pair, tmp_path / "d", "svd")
    assert "ok" in darex("verify", tmp_path / "d", "--base", pair[0]).output
    darex("apply", pair[0], tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


# The documentation of how to read a file without this library


@pytest.fixture(scope="module")
def reader():
    """`read_delta` of docs/format.md."""
    page = Path(__file__).parent.parent / "docs/format.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    assert "darex_jax" not in code and "jax" not in code.replace("darex", "")
    names = {}
    exec(compile(code, str(page), "exec"), names)
    return names["read_delta"]


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 1}], ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_the_documented_reader_reads_it(tmp_path, pair, reader, method, options):
    prune(*pair, tmp_path / "d", method, options={} if method == "sign" else options)
    ours, theirs = flatten_names(dx.load_delta(tmp_path / "d")), reader(tmp_path / "d")
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(theirs[name], leaf)


def test_the_documented_reader_reads_float64(tmp_path, reader):
    with jax.enable_x64(True):
        delta = {"w": jnp.linspace(1.0, 2.0, 1000)}
        dx.save_delta(tmp_path / "d", jax.random.key(5), delta, 0.9, 0.3, base=delta)
        ours = dx.load_delta(tmp_path / "d")["w"]
        assert ours.dtype == reader(tmp_path / "d")["w"].dtype == np.float64
        np.testing.assert_array_equal(ours, reader(tmp_path / "d")["w"])


def test_the_documented_reader_reads_format_1(reader):
    folders = sorted((Path(__file__).parent / "data/format1").glob("*/delta.safetensors"))
    assert len(folders) >= 3
    for path in folders:
        with DeltaFile(path) as d:
            expected = {}
            for name, entry in d.recipe.parameters.items():
                flat = np.zeros(int(np.prod(entry["shape"])), np.float32)
                for index, numbers in d.chunks_of(name):  # each is smaller than a chunk
                    flat[index] = numbers
                expected[name] = flat.reshape(entry["shape"])
        found = reader(path)
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
