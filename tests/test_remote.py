"""Remote paths: commands read from and write to fsspec URLs."""

import json
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError, FileError
from darex_jax.core.tree import unflatten_names
from darex_jax.files.remote import _put, fetch, send
from tests.test_bank import darex
from tests.test_orbax import named, save, tree


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


@pytest.fixture(scope="module")
def s3_server():
    """A local S3 server."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def root(request, memory, tmp_path, monkeypatch):
    if request.param != "s3":
        return "memory://bucket" if request.param == "memory" else f"file://{tmp_path}/bucket"
    options = {"endpoint_url": request.getfixturevalue("s3_server"), "key": "k", "secret": "s"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options | {"skip_instance_cache": True})
    bucket = f"bucket-{tmp_path.name.lower().replace('_', '-')[-40:]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


def put(url, folder):
    send(folder, url)
    return url


def test_the_workflow_on_remote_paths(tmp_path, root):
    states = {"base": tree(0), "fine": tree(1)}
    for name, state in states.items():
        dx.save_params(tmp_path / name, {"model": unflatten_names(named(state))}, {"model_type": "newest"})
    base, fine = (put(f"{root}/{name}", tmp_path / name) for name in states)
    out = darex("prune", base, fine, f"{root}/deltas/d.safetensors", "-p", 0.5)
    assert f"uploaded to {root}/deltas/d.safetensors" in out.output
    darex("prune", tmp_path / "base", tmp_path / "fine", tmp_path / "here", "-p", 0.5)
    local = fetch(f"{root}/deltas/d.safetensors", tmp_path)
    assert local.read_bytes() == (tmp_path / "here").read_bytes()
    seen = darex("verify", f"{root}/deltas/d.safetensors", "--base", base, "--json")
    assert json.loads(seen.stdout)["delta"] == f"{root}/deltas/d.safetensors"
    patch = ("--to", "patch", "--base", base, "--json")
    seen = darex("export", f"{root}/deltas/d.safetensors", f"{root}/patch.safetensors", *patch)
    assert json.loads(seen.stdout)["out"] == f"{root}/patch.safetensors"
    darex("apply", base, f"{root}/deltas/d.safetensors", f"{root}/out")
    again = darex("apply", base, f"{root}/deltas/d.safetensors", f"{root}/out", code=1)
    assert f"{root}/out: already exists; choose another path, or pass --overwrite" in again.output
    store, place = fsspec.core.url_to_fs(f"{root}/out")
    store.pipe_file(f"{place}/old.txt", b"of another model")
    darex("apply", base, f"{root}/deltas/d.safetensors", f"{root}/out", "--overwrite")
    darex("apply", tmp_path / "base", tmp_path / "here", tmp_path / "out2")
    (tmp_path / "fetched").mkdir()
    restored = fetch(f"{root}/out", tmp_path / "fetched")
    assert {p.name: p.read_bytes() for p in restored.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out2").iterdir()
    }


def test_a_branch_and_a_table_on_remote_paths(tmp_path, memory):
    for i, name in enumerate(("base", "fine")):
        put(f"memory://runs/{name}", save(tmp_path / name, {"ema": tree(i)}))
    darex("prune", "memory://runs/base#ema", "memory://runs/fine#ema", tmp_path / "d", "-p", 0.5)
    assert set(dx.load_delta(tmp_path / "d")) == {"layers"}
    table = darex("eval", tmp_path / "base", "--data", "memory://runs/none.csv", "--text", "a", code=2)
    assert "--data memory://runs/none.csv must be a local path" in table.output


def test_errors_name_the_url_that_was_given(tmp_path, memory):
    for i, name in enumerate(("base", "fine")):
        dx.save_params(tmp_path / name, {"a": np.full((2, 2), i, np.float32)})
        put(f"memory://named/{name}", tmp_path / name)
    darex("prune", "memory://named/base", "memory://named/fine", "memory://named/d", "-p", 0)
    wrong = darex("verify", "memory://named/d", "--base", "memory://named/fine", code=1)
    assert "base that memory://named/d was made from" in wrong.output


def test_failures_are_one_line_and_leave_nothing(tmp_path, memory, monkeypatch):
    nothing = darex("inspect", "memory://nowhere/d", code=1)
    assert "memory://nowhere/d: does not exist" in nothing.output
    assert "unknown protocol" in darex("inspect", "nostore://x/y", code=1).output
    dx.save_params(tmp_path / "base", {"a": np.ones((2, 2), np.float32)})
    failed = darex("prune", tmp_path / "base", tmp_path / "absent", "memory://b/d", "-p", 0.5, code=1)
    assert "sent to" not in failed.output and not memory.exists("/b/d")
    here = darex("train", tmp_path / "base", "memory://b/out", code=2)
    assert "must be a local path" in here.output

    def full(*args, **kwargs):
        raise OSError("quota exceeded\nfor the bucket")

    monkeypatch.setattr(type(memory), "put_file", full)
    with pytest.raises(FileError, match=r"memory://b/x: cannot be written \(quota exceeded\)"):
        send(tmp_path / "base" / "model.safetensors", "memory://b/x")
    dx.save_params(tmp_path / "fine", {"a": 2 * np.ones((2, 2), np.float32)})
    lost = darex("prune", tmp_path / "base", tmp_path / "fine", "memory://b/d", "-p", 0, code=1)
    kept = lost.output.split("The output is kept in ")[1].strip().removesuffix(".")
    assert dx.load_delta(kept)["a"].shape == (2, 2)
    monkeypatch.setattr(
        fsspec.core, "url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("install gcsfs"))
    )
    with pytest.raises(DarexError, match=r"gs://b/x: install gcsfs"):
        fetch("gs://b/x", tmp_path)


def test_an_incomplete_directory_is_not_a_model(tmp_path, memory, monkeypatch):
    dx.save_params(tmp_path / "m", {"a": np.ones((2, 2), np.float32)}, {"model_type": "x"})
    put("memory://b/m", tmp_path / "m")
    order = []
    whole = type(memory).put_file

    def watched(self, local, place, **kwargs):
        order.append((place.rpartition("/")[2], self.exists("/b/m/config.json")))
        return whole(self, local, place, **kwargs)

    monkeypatch.setattr(type(memory), "put_file", watched)
    put("memory://b/m", tmp_path / "m")
    assert {name for name, _ in order[-2:]} == {"config.json", "model.safetensors"}
    assert not any(there for name, there in order[:-2])
    assert json.loads(memory.cat_file("/b/m/config.json")) == {"model_type": "x"}


def test_a_lost_connection_leaves_the_older_file(tmp_path):
    """On a store that is neither an object store nor this machine's files."""
    from fsspec.implementations.dirfs import DirFileSystem

    class Lost(DirFileSystem):
        protocol = "lost"

        def put_file(self, local, place, **kwargs):
            self.pipe_file(place, b"half")
            raise OSError("connection lost")

    fsspec.register_implementation("lost", Lost, clobber=True)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/d").write_bytes(b"older")
    (tmp_path / "new").write_bytes(b"newer")
    Lost.clear_instance_cache()
    store = Lost(path=str(tmp_path / "store"), fs=fsspec.filesystem("file"))
    with pytest.raises(OSError, match="connection lost"):
        _put(store, tmp_path / "new", "d")
    assert (tmp_path / "store/d").read_bytes() == b"older"


def test_inputs_and_other_directories_are_not_replaced(tmp_path, root):
    for i, name in enumerate(("base", "fine")):
        dx.save_params(tmp_path / name, {"a": np.full((2, 2), i, np.float32)})
        put(f"{root}/{name}", tmp_path / name)
    base, fine = f"{root}/base", f"{root}/fine"
    darex("prune", base, fine, f"{root}/d", "-p", 0)
    store, place = fsspec.core.url_to_fs(root)
    before = {name: store.cat_file(name) for name in store.find(place)}
    for command in (
        ("apply", base, f"{root}/d", base, "--overwrite"),
        ("prune", base, fine, f"{fine}/model.safetensors", "-p", 0),
        ("apply", base, f"{root}/d", root, "--overwrite"),
    ):
        assert "would replace" in darex(*command, code=1).output
    store.makedirs(f"{place}/docs/sub", exist_ok=True)
    store.pipe_file(f"{place}/docs/thesis.txt", b"years")
    store.pipe_file(f"{place}/docs/sub/config.json", b"{}")
    refused = darex("apply", base, f"{root}/d", f"{root}/docs", "--overwrite", code=1)
    assert "is not a model directory and is not replaced" in refused.output
    line = ("export", f"{root}/d", f"{root}/docs/thesis.txt", "--to", "patch", "--base", base)
    assert "thesis.txt: already exists; choose another path" in darex(*line, code=1).output
    assert store.cat_file(f"{place}/docs/thesis.txt") == b"years"
    assert {name: store.cat_file(name) for name in before} == before
    assert not list(Path(tempfile.gettempdir()).glob("darex-*"))
