"""Artifacts and checkpoints that are damaged, forged, or changed while they are read."""

import json
import os

import blake3
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.cli import main
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.checkpoint import INDEX, Checkpoint
from darex_jax.files.recipe import canonical_json, tensor_line
from darex_jax.files.restore import restored_params
from darex_jax.files.safetensors import MAX_NAME, FileError, SafetensorsFile, as_bytes, write_tensors
from darex_jax.tasks.batching import load_tokenizer
from tests.pairs import darex, encoder, prune, read_all, with_files, write

POOLER, BIAS = "bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.bias"


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, body):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(FileError), DeltaFile(path) as d:
        from darex_jax.files.restore import verify_artifact

        verify_artifact(d)


def test_every_truncation_is_refused(tmp_path, pair):
    prune(*pair, tmp_path / "d")
    data = (tmp_path / "d").read_bytes()
    cuts = [*range(0, 16), *range(16, len(data), len(data) // 40), len(data) - 1]
    for cut in cuts:
        refused(tmp_path / "cut", data[:cut])
    refused(tmp_path / "long", data + b"\0")


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_flipped_bit_is_refused_or_harmless(tmp_path, position, bit):
    if not (tmp_path / "d").exists():
        base = write(tmp_path / "base", encoder(0, prefix="", head=False))
        prune(base, write(tmp_path / "fine", encoder(1)), tmp_path / "d")
    data = bytearray((tmp_path / "d").read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    (tmp_path / "flipped").write_bytes(data)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "flipped")])
    assert result.exit_code in (0, 1) and (
        result.exception is None or isinstance(result.exception, SystemExit)
    )
    if result.exit_code == 0:  # only whitespace of the padding is harmless
        assert header_of(bytes(data)) == header_of((tmp_path / "d").read_bytes())


def test_a_renamed_tensor_is_refused(tmp_path, pair):
    prune(*pair, tmp_path / "d")
    data = (tmp_path / "d").read_bytes()
    assert data.count(b'"dense/classifier.weight"') == 1
    refused(tmp_path / "renamed", data.replace(b'"dense/classifier.weight"', b'"dense/classifier.weighs"'))


def test_forged_headers_are_refused(tmp_path, pair):
    prune(*pair, tmp_path / "d")
    header, body = header_of((tmp_path / "d").read_bytes())
    name = next(n for n in header if n.startswith("values/"))
    start, end = header[name]["data_offsets"]
    for entry in (
        {"shape": [2**62]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"shape": "x"},
        {"shape": [0, 2**62], "data_offsets": [start, start]},
        {"dtype": "F99"},
        {"dtype": ["F32"]},
        {"data_offsets": [start, end + 2**50]},
        {"data_offsets": [end, start]},
        {"data_offsets": [start + 4, end]},
        {"data_offsets": []},
    ):
        refused(tmp_path / "lie", with_header(header | {name: header[name] | entry}, body))
    refused(tmp_path / "lie", (2**63).to_bytes(8, "little") + b"{}")
    refused(tmp_path / "lie", with_header([], b""))
    refused(tmp_path / "lie", b"\x10" + b"\0" * 7 + b"[" * 16)
    text = json.dumps(header)
    twice = text[:-1] + "," + json.dumps({name: header[name]})[1:]
    refused(tmp_path / "lie", len(twice).to_bytes(8, "little") + twice.encode() + body)
    for bad in ("values/\ud800", "values/\x1b[31m", "values/" + "a." * 3000):
        refused(tmp_path / "lie", with_header({n if n != name else bad: e for n, e in header.items()}, body))
    evil = {n.replace("file/config.json", "file/../../x"): entry for n, entry in header.items()}
    refused(tmp_path / "lie", with_header(evil, body))
    write_tensors(tmp_path / "plain", {"w": np.zeros(3, np.float32)})
    with pytest.raises(FileError, match="not a delta made by darex"):
        DeltaFile(tmp_path / "plain")


def test_tensor_names_have_a_maximum_length(tmp_path):
    for length in (MAX_NAME, MAX_NAME + 1):
        write_tensors(tmp_path / f"{length}", {"n" * length: np.zeros(3, np.float32)})
    assert MAX_NAME == 500
    with SafetensorsFile(tmp_path / "500") as file:
        assert list(file.tensors) == ["n" * 500]
    with pytest.raises(FileError, match="invalid tensor name 'nnn"):
        SafetensorsFile(tmp_path / "501")


def test_names_that_no_reader_takes_are_not_written(tmp_path):
    name = "layers.0." + "n" * (MAX_NAME - 12)
    for i, model in enumerate(("base", "fine")):
        dx.save_params(tmp_path / model, {name: np.full((4, 4), i, np.float32)}, {"model_type": "x"})
    line = ("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "d", "-p", 0.5)
    assert "is not a valid tensor name in a file" in darex(*line, code=1).output
    assert not (tmp_path / "d").exists()


def forge(path, source, change_recipe=None, change_tensors=None):
    """The artifact `source` with another recipe or other tensors, and updated digests."""
    with DeltaFile(source) as d:
        tensors, recipe = {name: d.read(name) for name in d.tensors}, json.loads(d.metadata["darex"])
    (change_tensors or (lambda _: None))(tensors)
    digest = blake3.blake3()
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        digest.update(tensor_line(name, tensors[name].dtype, tensors[name].shape))
        digest.update(as_bytes(tensors[name]))
    recipe["data_blake3"] = digest.hexdigest()
    (change_recipe or (lambda _: None))(recipe)
    text = canonical_json(recipe)
    metadata = {"darex": text, "blake3": blake3.blake3(text.encode()).hexdigest()}
    write_tensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "text"), [(lambda x: np.append(x, x[:1]), "more"), (lambda x: x[:-1], "fewer")]
)
def test_the_number_of_values_must_match_the_mask(tmp_path, pair, change, text):
    """A difference of one is too small for the checks at opening."""
    prune(*pair, tmp_path / "d")
    values = f"values/{POOLER}"
    forge(tmp_path / "forged", tmp_path / "d", None, lambda t: t.update({values: change(t[values])}))
    with pytest.raises(FileError, match=f"'{POOLER}' has {text} values than its mask has survivors"):
        dx.load_delta(tmp_path / "forged")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *[
            (lambda r, q=q: r["parameters"][POOLER].update(q=q), f"q of '{POOLER}'")
            for q in ("0.5", True, [1], None, 1e-46, 1e39, 10**400, float("nan"), -1)
        ],
        *[
            (lambda r, s=s: r["parameters"][POOLER].update(shape=s), f"shape of '{POOLER}'")
            for s in (None, "16", [True, 256], [2**47, 2**47], [0, 2**47, 2**47], [1] * 33, {"16": 16})
        ],
        *[
            (lambda r, k=k: r.update(key=k), "damaged metadata")
            for k in ([0.5, 1], [False, True], [0, 1, 2], "ab", 7)
        ],
        *[
            (lambda r, f=f, v=v: r.update({f: v}), "damaged metadata")
            for f, v in {
                "drop_rate": "0.9",
                "base": [],
                "base_names": [],
                "base_only": None,
                "versions": [1],
                "inexact": "many",
                "nonfinite": float("nan"),
                "data_blake3": 5,
                "scope": 1,
                "method": [1],
            }.items()
        ],
        (lambda r: r.update(drop_rate=10**400), "'drop_rate' is invalid"),
        (lambda r: r.update(base_only="bert"), "'base_only' is invalid"),
        (lambda r: r["base_names"].update({POOLER: ["x"]}), "'base_names' is invalid"),
        (lambda r: r.pop("versions"), "'versions' is missing"),
        (lambda r: r.update(format=3), "format 3, this version reads up to 2; update darex_jax"),
        (lambda r: r.update(format="\x1b[31m"), "'format' is invalid"),
        (lambda r: r.update(base_files={"config.json": 1}), "'base_files' is invalid"),
        (lambda r: r["parameters"][POOLER].update(dtype="F99"), f"dtype of '{POOLER}'"),
        (lambda r: r["parameters"][POOLER].update(dtype="I8"), f"'{POOLER}' would be restored in I8"),
        (lambda r: r["base"].update({"a\nb": {}}), "invalid tensor 'a.nb' in the base"),
        (lambda r: r["base"]["pooler.dense.weight"].update(shape=5), "in the base"),
        (lambda r: r["base"]["pooler.dense.weight"].update(blake3="ab"), "fingerprint"),
        (lambda r: r["base_names"].update({"x": "pooler.dense.weight"}), "have the same base parameter"),
    ],
)
def test_forged_recipes_are_refused(tmp_path, pair, change, text):
    prune(*pair, tmp_path / "d")
    with pytest.raises(FileError, match=text):
        DeltaFile(forge(tmp_path / "forged", tmp_path / "d", change))


def test_unknown_fields_of_a_recipe_are_ignored(tmp_path, pair):
    """Of a later version or an attacker: nested so deeply that it could not even be copied."""
    prune(*pair, tmp_path / "d")
    deep = json.loads("[" * 900 + "]" * 900)

    def change(recipe):
        recipe["x"] = recipe["parameters"][POOLER]["x"] = recipe["base"]["pooler.dense.weight"]["x"] = deep

    digests = [
        json.loads(darex("inspect", forge(tmp_path / "forged", tmp_path / "d", c), "--json").stdout)["digest"]
        for c in (None, change)
    ]
    assert digests[0] == digests[1]


def test_a_shape_without_its_survivors_is_refused(tmp_path, pair):
    """Otherwise a file of a few bytes would make its reader allocate terabytes."""
    prune(*pair, tmp_path / "d")

    def huge(recipe):
        for entry in (recipe["parameters"][POOLER], recipe["base"]["pooler.dense.weight"]):
            entry["shape"] = [2**47]

    with pytest.raises(FileError, match=f"a mask of {2**47} entries has about"):
        dx.load_delta(forge(tmp_path / "forged", tmp_path / "d", huge))


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        (f"values/{POOLER}", np.ones(25, np.int32), "are int32, not floating"),
        (f"dense/{POOLER}", np.ones((16, 16), np.float32), "stored twice, pruned and whole"),
        (f"rows/{BIAS}", np.ones((), np.float32), "do not match its shape"),
        (f"rows/{BIAS}", np.ones(5, np.float32), "do not match its shape"),
        (f"rows/{POOLER}", np.ones((5, 3), np.float32), "do not match its shape"),
    ],
)
def test_forged_tensors_are_refused(tmp_path, pair, name, array, text):
    prune(*pair, tmp_path / "d")
    with pytest.raises(FileError, match=text):
        DeltaFile(forge(tmp_path / "forged", tmp_path / "d", None, lambda t: t.update({name: array})))


def test_a_tensor_named_metadata_is_not_written(tmp_path, pair):
    prune(*pair, tmp_path / "d")
    change = {"dense/__metadata__": np.ones(3, np.float32)}
    forge(tmp_path / "forged", tmp_path / "d", None, lambda t: t.update(change))
    error = darex("apply", pair[0], tmp_path / "forged", tmp_path / "out", code=1).stderr
    assert "'__metadata__' is a reserved name" in error and not (tmp_path / "out").exists()


def test_strings_of_a_file_are_printed_verbatim(tmp_path, pair):
    prune(*pair, tmp_path / "d", scope_text="include [a-z]+ [/x] \x1b[31m \ud800")
    assert "include [a-z]+ [/x] \\x1b[31m \\ud800" in darex("inspect", tmp_path / "d").stdout


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in darex("inspect", tmp_path / "pipe", code=1).stderr


def test_an_index_must_find_its_tensors(tmp_path):
    path = write(tmp_path / "base", encoder(0), shards=2)
    index = json.loads((path / INDEX).read_text())
    file = index["weight_map"]["classifier.weight"]
    index["weight_map"]["lm_head.weight"] = file  # tied to the embeddings, so not stored
    (path / INDEX).write_text(json.dumps(index))
    assert len(read_all(path)) == len(encoder(0))
    index["weight_map"]["bert.encoder.layer.1.output.dense.weight"] = file
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        FileError, match=r"lists 'bert.encoder.layer.1.output.dense.weight', which is in none"
    ):
        Checkpoint(path)


def test_index_with_a_path_is_refused(tmp_path):
    write(tmp_path / "base", encoder(0), shards=2)
    (tmp_path / "base" / INDEX).write_text('{"weight_map": {"w": "../secret.safetensors"}}')
    with pytest.raises(FileError, match="not the name of a file in that directory"):
        Checkpoint(tmp_path / "base")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="a pickle, which is never read"):
        Checkpoint(tmp_path / "pickled")


@pytest.mark.parametrize(("drop_rate", "shape"), [(1 - 2**-33, [2**46]), (1 - 2**-32, [2**40])])
def test_a_small_file_cannot_claim_a_large_model(tmp_path, pair, drop_rate, shape):
    prune(*pair, tmp_path / "d")

    def huge(recipe):
        for entry in (recipe["parameters"][POOLER], recipe["base"]["pooler.dense.weight"]):
            entry["shape"] = shape
        recipe["drop_rate"] = drop_rate

    def thin(tensors):
        for name in tensors:
            if name.startswith("values/"):
                tensors[name] = tensors[name][:0]
        tensors[f"values/{POOLER}"] = np.ones(round(shape[0] * (1 - drop_rate)) % 2**13, np.float32)

    path = forge(tmp_path / "forged", tmp_path / "d", huge, thin)
    claims = (
        f"claims {shape[0] + 1856:,} entries in a file of .* bytes; without the base at most .* are accepted"
    )
    with pytest.raises(FileError, match=claims):
        dx.load_delta(path)
    assert "(--max-entries) allows them" in darex("verify", path, code=1).stderr
    assert "not the base" in darex("verify", path, "--base", pair[0], code=1).stderr
    assert "not the base" in darex("apply", pair[0], path, tmp_path / "out", code=1).stderr


def test_the_bound_of_entries_is_an_argument(tmp_path, pair):
    entries = prune(*pair, tmp_path / "d").pruned_size
    darex("verify", tmp_path / "d", "--max-entries", entries)
    assert "at most 10 are accepted" in darex("verify", tmp_path / "d", "--max-entries", 10, code=1).stderr
    dx.load_delta(tmp_path / "d", max_entries=entries)
    with pytest.raises(FileError, match=f"claims {entries:,} entries"):
        dx.load_delta(tmp_path / "d", max_entries=entries - 1)


def load_restored(base, delta):
    with Checkpoint(base) as b, DeltaFile(delta) as d:
        return dict(restored_params(b, d))


@pytest.mark.parametrize("kind", ["values", "dense", "rows", "file"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, kind):
    """Every reader gives verified data or an error, even if the file was changed and changed back."""
    base = write(tmp_path / "base", encoder(0, prefix="", head=False))
    fine = encoder(1, rows=53 if kind == "rows" else 50)
    (with_files(write(tmp_path / "fine", fine)) / "config.json").write_text('{"num_labels": 2}')
    prune(base, tmp_path / "fine", tmp_path / "d", 0.5)
    (base / "vocab.txt").touch()
    with DeltaFile(tmp_path / "d") as d:
        at = next(d.tensors[name].offset for name in d.tensors if name.startswith(f"{kind}/"))
    good = (tmp_path / "d").read_bytes()
    check = DeltaFile.check_data

    def put_back(self):
        (tmp_path / "d").write_bytes(good)
        check(self)

    monkeypatch.setattr(DeltaFile, "check_data", put_back)
    routes = {
        "values": lambda: dx.load_delta(tmp_path / "d"),
        "dense": lambda: dx.load_kept(tmp_path / "d"),
        "file": lambda: load_tokenizer(base, tmp_path / "d"),
    }
    changed = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    (tmp_path / "d").write_bytes(changed)
    error = darex("apply", base, tmp_path / "d", tmp_path / "out", code=1).stderr
    assert "changed while it was read" in error and not (tmp_path / "out").exists()
    (tmp_path / "d").write_bytes(changed)
    with pytest.raises(FileError, match="changed while it was read"):
        routes.get(kind, lambda: load_restored(base, tmp_path / "d"))()


def test_one_digest_one_model(tmp_path, pair):
    """The digest shown by `inspect` covers everything that determines the restored model, and nothing
    else."""
    prune(*pair, tmp_path / "d")

    def digest(change=None, change_tensors=None):
        path = forge(tmp_path / "forged", tmp_path / "d", change, change_tensors)
        return json.loads(darex("inspect", path, "--json").stdout)["digest"]

    def renamed(recipe):
        recipe["base_names"]["bert.encoder.layer.0.output.LayerNorm.weight"] = (
            "encoder.layer.0.output.dense.bias"
        )
        recipe["base_names"][BIAS] = "encoder.layer.0.output.LayerNorm.weight"

    same = digest()
    assert same in darex("inspect", tmp_path / "forged").stdout.replace("\n", "").replace("│", "").replace(
        " ", ""
    )
    assert digest(lambda r: r["versions"].update(jax="9")) == same
    others = [
        digest(renamed),
        digest(lambda r: r["parameters"][POOLER].update(q=0.5)),
        digest(lambda r: r["parameters"][POOLER].update(dtype="BF16")),
        digest(lambda r: r.update(key=[0, 1])),
        digest(lambda r: r.update(scope="another")),
        digest(lambda r: r.update(drop_rate=0.90001)),
        digest(lambda r: r.update(base_files={"vocab.txt": "0" * 64})),
        digest(lambda r: r["base"]["pooler.dense.weight"].update(blake3="0" * 64)),
        digest(None, lambda t: t[f"values/{POOLER}"].__setitem__(0, 7)),
    ]
    assert len({same, *others}) == 10


def test_texts_of_a_file_never_reach_the_terminal(tmp_path, pair):
    evil = "\x1b[31m\u202e\r\nError: all is well\x07"
    prune(*pair, tmp_path / "d")
    changes = (
        lambda r: r.update(scope=evil, method=evil, versions={evil: evil}),
        lambda r: r["base"].update({evil: r["base"]["pooler.dense.weight"]}),
        lambda r: r["base_only"].append(evil),
        lambda r: r.update(format=evil),
        lambda r: r.update({"data_blake3": evil}),
    )
    base = pair[0]
    runs = []
    for change in changes:
        forged = forge(tmp_path / "forged", tmp_path / "d", change)
        for command in (("inspect", forged), ("verify", forged), ("apply", base, forged, tmp_path / "out")):
            runs.append(CliRunner().invoke(main, [str(a) for a in command]))
    (base / "config.json").write_text(json.dumps({"model_type": evil, "hidden_act": evil}))
    (pair[1] / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu"}))
    q_file = tmp_path / "q.json"
    q_file.write_text(json.dumps({"q": {evil: 0.5}}))
    (tmp_path / "stale.json").write_text(json.dumps({"q": 0.5, "drop_rate": evil}))
    runs += [
        CliRunner().invoke(main, [str(a) for a in command])
        for command in (
            ("check", *pair),
            ("prune", *pair, tmp_path / "e", "-p", 0.9),
            ("prune", pair[1], pair[1], tmp_path / "e", "-p", 0.9, "--q", q_file),
            ("prune", pair[1], pair[1], tmp_path / "e", "-p", 0.9, "--q", tmp_path / "stale.json"),
        )
    ]
    assert all(run.exit_code == 1 for run in runs[3:-1]) and sum("all is well" in r.output for r in runs) > 4
    for run in runs:
        assert run.exception is None or isinstance(run.exception, SystemExit)
        assert not set(run.output) & {"\x1b", "\u202e", "\r", "\x07"}
        assert not any(line.startswith("Error: all is well") for line in run.output.splitlines())
