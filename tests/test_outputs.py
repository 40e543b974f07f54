"""What commands write, and what they do not replace."""

import json
import os

from darex_jax.files.checkpoint import INDEX
from tests.pairs import darex, encoder, prune, read_all, write


def test_one_shard_keeps_its_index(tmp_path, pair):
    """A file name like model-00001-of-00001.safetensors is not found without an index."""
    base, fine = pair
    shard = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / shard)
    (base / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(encoder(0, prefix="", head=False), shard)})
    )
    prune(base, fine, tmp_path / "d")
    darex("apply", base, tmp_path / "d", tmp_path / "out")
    assert read_all(tmp_path / "out").keys() == encoder(1).keys()


def test_a_failing_writer_leaves_the_old_file(tmp_path, pair, monkeypatch):
    out = tmp_path / "d"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert "No space left on device" in darex("prune", *pair, out, "-p", 0.9, code=1).stderr
        assert out.read_bytes() == b"old" and not list(tmp_path.glob(".*partial"))


def test_inputs_are_never_replaced(tmp_path, pair):
    base, fine = pair
    prune(base, fine, tmp_path / "d")
    sharded = write(tmp_path / "sharded", encoder(0, prefix="", head=False), shards=2)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "d").write_bytes((tmp_path / "d").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (
        ("prune", base, fine, fine / "model.safetensors", "-p", 0.9),
        ("prune", base, fine, base / "config.json", "-p", 0.9),
        ("prune", sharded, fine, sharded / "model.safetensors", "-p", 0.9),
        ("prune", sharded, fine, sharded / "vocab.txt", "-p", 0.9),
        ("apply", base, tmp_path / "d", base, "--overwrite"),
        ("apply", base, inside / "d", inside, "--overwrite"),
        ("apply", base, tmp_path / "d", tmp_path, "--overwrite"),
    ):
        assert "writing this would replace" in darex(*arguments, code=1).stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_only_model_directories_are_replaced(tmp_path, pair):
    base, fine = pair
    prune(base, fine, tmp_path / "d")
    (tmp_path / "home/letters").mkdir(parents=True)
    (tmp_path / "home/config.json").write_text("{}")
    (tmp_path / "home/letters/thesis").write_text("x")
    assert "is a directory" in darex("prune", base, fine, tmp_path / "home", "-p", 0.9, code=1).stderr
    for out in (tmp_path / "home", tmp_path / "home/letters", tmp_path / "home/letters/thesis"):
        error = darex("apply", base, tmp_path / "d", out, "--overwrite", code=1).stderr
        assert "is not a model directory and is not replaced" in error
    assert (tmp_path / "home/letters/thesis").read_text() == "x"


def test_links_and_deltas_beside_a_model(tmp_path, pair):
    """In the hub's cache a model's files are links: the link is an input too, a delta beside it is not."""
    base, fine = pair
    blob = tmp_path / "blob"
    (fine / "model.safetensors").rename(blob)
    (fine / "model.safetensors").symlink_to(blob)
    refused_ = darex("prune", base, fine, fine / "model.safetensors", "-p", 0.9, code=1).stderr
    assert "writing this would replace" in refused_ and (fine / "model.safetensors").is_symlink()
    for _ in range(2):
        darex("prune", base, fine, fine / "delta.safetensors", "-p", 0.9)


def test_a_base_in_one_file_is_restored_as_a_directory(tmp_path, pair):
    base, fine = pair
    darex("prune", base / "model.safetensors", fine, tmp_path / "d", "-p", 0.9)
    darex("apply", base / "model.safetensors", tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file() and read_all(tmp_path / "out").keys()
