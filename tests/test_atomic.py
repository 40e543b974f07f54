"""Atomic writing; files other than regular ones are neither read nor replaced."""

import ctypes
import errno
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

import darex_jax as dx
from darex_jax.cli import show, signals
from darex_jax.core.errors import DarexError
from darex_jax.files import atomic
from darex_jax.files.atomic import atomic_directory, atomic_file, only_one, write_whole
from darex_jax.files.card import CARD
from darex_jax.files.checkpoint import INDEX, Checkpoint
from darex_jax.files.paths import check_entries, read_text
from darex_jax.files.safetensors import FileError, write_tensors
from darex_jax.files.stream import in_order, run_all
from darex_jax.tasks.batching import load_tokenizer
from darex_jax.tasks.parquet import find_parquet
from tests.pairs import darex


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Names and locks.


def test_two_writers_with_the_same_process_id_do_not_interfere(tmp_path, monkeypatch):
    """As in two containers with a shared volume: the second must not remove the other's file."""
    with atomic_file(tmp_path / "d") as first, atomic_file(tmp_path / "d") as second:
        assert len(names(tmp_path)) == 2
        os.write(first, b"first")
        os.write(second, b"second")
    assert (tmp_path / "d").read_bytes() == b"first" and names(tmp_path) == ["d"]
    with atomic_directory(tmp_path / "m") as one, atomic_directory(tmp_path / "n") as other:
        assert one != other
    tokens = iter(["0" * 16, "0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(tokens))
    with atomic_file(tmp_path / "e"), atomic_file(tmp_path / "e"):  # existing names are skipped
        assert [name for name in names(tmp_path) if "partial" in name] == [
            f".e.{digit * 16}.partial" for digit in "01"
        ]


def test_the_second_writer_of_a_directory_fails(tmp_path):
    with pytest.raises(FileError, match="already exists"), atomic_directory(tmp_path / "m") as late:
        (late / "config.json").write_text("late")
        with atomic_directory(tmp_path / "m") as early:
            (early / "config.json").write_text("early")
    assert (tmp_path / "m/config.json").read_text() == "early" and names(tmp_path) == ["m"]


def test_a_writer_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".d.{'0' * 16}.partial").symlink_to(tmp_path / "victim")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: next(tokens))
    write_whole(tmp_path / "d", "new")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "d").read_text() == "new"


def test_leftovers_of_killed_processes_are_removed_and_others_kept(tmp_path):
    for kind in ("partial", "replaced"):
        (tmp_path / f".m.{'a' * 16}.{kind}").mkdir()
        (tmp_path / f".m.{'a' * 16}.{kind}" / "model.safetensors").touch()
    (tmp_path / f".m.{'b' * 16}.partial").touch()
    kept = [f".m.{'b' * 15}.partial", f".other.{'b' * 16}.partial", ".m.partial", f".m.{'b' * 16}.txt"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "m").mkdir()
    with atomic_directory(tmp_path / "m") as folder:
        assert names(tmp_path) == sorted([*kept, "m", folder.name])
    assert names(tmp_path) == sorted([*kept, "m"])


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_file(tmp_path / "d"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "d") and names(tmp_path) == []


def test_only_one_at_a_time(tmp_path):
    lock = tmp_path / "lock"
    with only_one(lock, ""), pytest.raises(FileError, match="busy"), only_one(lock, "busy"):
        pass
    with only_one(lock, "busy"):
        pass


# Replacing a directory.


def model(path, text):
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def replace(path, text):
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "config.json").write_text(text)


class Killed(BaseException):
    """Simulates SIGKILL: no cleanup runs."""


@pytest.fixture
def killed_at_rename(monkeypatch):
    """Makes the process "die" at the rename after `count` others, without cleanup."""

    def arrange(count):
        done = iter(range(count))
        rename = os.rename

        def dies(source, target):
            if next(done, None) is None:
                monkeypatch.setattr(atomic, "_remove", lambda path: None)
                monkeypatch.setattr(os, "rename", lambda source, target: None)
                raise Killed
            rename(source, target)

        monkeypatch.setattr(os, "rename", dies)

    return arrange


def test_directories_are_exchanged_in_one_step(tmp_path, killed_at_rename):
    model(tmp_path / "m", "old")
    ctypes.set_errno(0)
    if not atomic._exchange_at_once(model(tmp_path / "x", ""), tmp_path / "m"):
        assert ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS)
        pytest.skip("this file system cannot")
    assert (tmp_path / "x/config.json").read_text() == "old"
    killed_at_rename(0)  # no rename is needed
    replace(tmp_path / "m", "new")
    assert (tmp_path / "m/config.json").read_text() == "new" and names(tmp_path) == ["m", "x"]


@pytest.mark.parametrize("renames", [1, 2])
def test_without_an_exchange_the_next_writer_finds_a_model(tmp_path, monkeypatch, killed_at_rename, renames):
    """After one of the three renames the name does not exist, after two it is the new directory."""
    monkeypatch.setattr(atomic, "_exchange_at_once", lambda new, old: False)
    replace(model(tmp_path / "m", "old"), "newer")
    assert (tmp_path / "m/config.json").read_text() == "newer" and names(tmp_path) == ["m"]
    killed_at_rename(renames)
    with pytest.raises(Killed):
        replace(tmp_path / "m", "newest")
    assert (tmp_path / "m").exists() == (renames == 2) and len(names(tmp_path)) == 2
    monkeypatch.undo()
    with pytest.raises(FileError, match="already exists"), atomic_directory(tmp_path / "m"):
        pass
    assert (tmp_path / "m/config.json").read_text() == ("newer" if renames == 1 else "newest")
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("at_once", [True, False])
def test_an_interrupted_replacement_is_undone(tmp_path, monkeypatch, at_once):
    model(tmp_path / "m", "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at_once:
            patch.setattr(atomic, "_exchange_at_once", interrupted)
        else:
            patch.setattr(atomic, "_exchange_at_once", lambda new, old: False)
            rename = os.rename
            patch.setattr(
                os, "rename", lambda a, b: interrupted() if str(a).endswith("partial") else rename(a, b)
            )
        with pytest.raises(KeyboardInterrupt):
            replace(tmp_path / "m", "new")
    assert (tmp_path / "m/config.json").read_text() == "old" and names(tmp_path) == ["m"]
    (tmp_path / "link").symlink_to(tmp_path / "m")
    replace(tmp_path / "link", "new")
    assert (tmp_path / "m/config.json").read_text() == "new" and names(tmp_path) == ["link", "m"]


# Signals, to real processes.


# Every write takes a second. Background processes of a shell ignore SIGINT, as do their children.
SLOW_DAREX = """
import os, signal, time
pwrite = os.pwrite
os.pwrite = lambda *arguments: time.sleep(1) or pwrite(*arguments)
signal.signal(signal.SIGINT, signal.default_int_handler)
from darex_jax.cli import main
main()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base, a fine-tune and a delta."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "fine")):
        model(folder / name, '{"model_type": "bert"}')
        layers = {f"bert.layer.{i}.weight": np.full((4, 4), number, np.float32) for i in range(8)}
        write_tensors(folder / name / "model.safetensors", layers)
    darex("prune", folder / "base", folder / "fine", folder / "delta", "-p", 0.1)
    return folder


def stopped(folder, *arguments, number):
    """Runs a darex process that gets the signal while it writes. Returns: its exit code and stderr."""
    line = [sys.executable, "-c", SLOW_DAREX, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(dx.__file__).parent.parent)}
    process = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (signal.SIGTERM, ("apply", "base", "delta", "out")),
        (signal.SIGINT, ("prune", "base", "fine", "out", "-p", 0.1)),
    ],
)
def test_a_terminated_process_cleans_up(models, number, arguments):
    code, error = stopped(models, *arguments, number=number)
    assert code == 128 + number and "Traceback" not in error
    assert names(models) == ["base", "delta", "fine"]


def test_leftovers_of_a_killed_process_are_removed_by_the_next_one(models):
    code, _ = stopped(models, "apply", "base", "delta", "out", number=signal.SIGKILL)
    assert code == -signal.SIGKILL and len(list(models.glob(".out.*.partial"))) == 1
    darex("apply", models / "base", models / "delta", models / "out")
    assert names(models) == ["base", "delta", "fine", "out"]
    shutil.rmtree(models / "out")


def test_signals_are_deferred_during_imports_and_handlers_restored(tmp_path, monkeypatch):
    (tmp_path / "interrupted_import.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nsum(range(1000))\ndone = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, signals.unwinding():
        import interrupted_import

        assert interrupted_import.done
        time.sleep(10)  # the signal comes again
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before

    ended = []

    def while_collecting(phase, info):
        if not ended:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))
            ended.append(phase)

    gc.callbacks.append(while_collecting)
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), signals.unwinding():
            gc.collect()
            assert ended == ["start"]
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, own)
        gc.callbacks.remove(while_collecting)


def test_a_signal_in_a_finalizer_or_a_weak_reference_s_callback_is_not_lost():
    done = []

    def interrupted(_=None):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))
        done.append(True)

    class Finalized:
        __del__ = interrupted

    class Finalizer:
        def __del__(self):
            interrupted()

    class Referred:
        pass

    def drop_referred():
        referred = Referred()
        watched = weakref.ref(referred, interrupted)
        del referred
        return watched

    for drop, finished in ((Finalizer, True), (Finalized, False), (drop_referred, False)):
        done.clear()
        hook = sys.unraisablehook
        with pytest.raises(SystemExit) as caught, signals.unwinding():
            drop()
            time.sleep(10)
        assert caught.value.code == 143 and bool(done) == finished and sys.unraisablehook is hook


def test_a_signal_right_after_a_temporary_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    make = atomic._new_file

    def then_the_signal(path):
        file = make(path)
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))
        return file

    monkeypatch.setattr(atomic, "_new_file", then_the_signal)
    with pytest.raises(SystemExit), signals.unwinding(), atomic_file(tmp_path / "out"):
        time.sleep(10)
    assert names(tmp_path) == []


def test_ctrl_c_is_130(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("darex_jax.files.artifact.DeltaFile", interrupted)
    assert darex("inspect", tmp_path, code=130).stderr == "interrupted\n"


# Files other than regular ones.


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # socket paths have a short maximum length
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


KINDS = {"a pipe": pipe, "a device": device, "a socket": unix_socket}


@pytest.fixture(params=KINDS)
def odd(request, tmp_path):
    """Creates a pipe, a device or a socket at a path. Returns its name."""

    def make(path):
        path.unlink(missing_ok=True)
        KINDS[request.param](path)
        return request.param

    return make


def encoder(path):
    model(path, '{"model_type": "bert"}')
    write_tensors(path / "model.safetensors", {"bert.w": np.ones(9, np.float32)})
    return path


def test_inputs_are_regular_files(tmp_path, odd):
    base, fine = encoder(tmp_path / "base"), encoder(tmp_path / "fine")
    darex("prune", base, fine, tmp_path / "d", "-p", 0.5)
    kind = odd(tmp_path / "odd")
    for command in (
        ("check", tmp_path / "odd", fine),
        ("apply", base, tmp_path / "odd", tmp_path / "out"),
        ("prune", base, fine, tmp_path / "e", "-p", 0.5, "--q", tmp_path / "odd"),
        ("repeat", tmp_path / "odd"),
        ("train", base, tmp_path / "out", "--config", tmp_path / "odd"),
    ):
        assert f"odd: is {kind}; a regular file is needed" in darex(*command, code=1).stderr
    for folder, name in [
        (base, "config.json"), (base, "model.safetensors"), (fine, "vocab.txt"), (base, "vocab.txt"),
    ]:  # fmt: skip
        old = (folder / name).read_bytes() if (folder / name).exists() else None
        odd(folder / name)
        if (folder, name) == (base, "vocab.txt"):  # files of both are compared
            (fine / name).write_text("x")
        error = darex("prune", base, fine, tmp_path / "e", "-p", 0.5, code=1).stderr
        assert f"{name}: is {kind}" in error
        (folder / name).unlink()
        (fine / "vocab.txt").unlink(missing_ok=True)
        if old is not None:
            (folder / name).write_bytes(old)
    odd(base / "tokenizer.json")
    with pytest.raises(DarexError, match=rf"tokenizer.json: is {kind}"):
        load_tokenizer(base)
    odd(tmp_path / "train-1.parquet")
    with pytest.raises(DarexError, match=rf"train-1.parquet: is {kind}"):
        find_parquet("cola", tmp_path, ["train"])
    assert names(tmp_path) == ["base", "d", "fine", "odd", "train-1.parquet"]


def test_outputs_replace_regular_files_alone(tmp_path, odd):
    base, fine = encoder(tmp_path / "base"), encoder(tmp_path / "fine")
    darex("prune", base, fine, tmp_path / "d", "-p", 0.5)
    kind = odd(tmp_path / "odd")
    before = os.lstat(tmp_path / "odd").st_ino
    error = darex("prune", base, fine, tmp_path / "odd", "-p", 0.5, code=1).stderr
    assert f"odd: is {kind}; a regular file is needed" in error
    find = ("find-q", base, fine, "-p", 0.5, "--out")
    assert f"is {kind}" in darex(*find, tmp_path / "odd", code=1).stderr
    os.rename(tmp_path / "odd", tmp_path / "q.png")
    assert f"q.png: is {kind}" in darex(*find, tmp_path / "q.json", code=1).stderr
    os.rename(tmp_path / "q.png", tmp_path / "odd")
    apply = ("apply", base, tmp_path / "d", tmp_path / "odd")
    assert "already exists" in darex(*apply, code=1).stderr
    assert "is not a model directory and is not replaced" in darex(*apply, "--overwrite", code=1).stderr
    for write in (lambda path: only_one(path, ""), atomic_file):
        with pytest.raises(FileError, match=f"is {kind}"), write(tmp_path / "odd"):
            pass
    assert os.lstat(tmp_path / "odd").st_ino == before and names(tmp_path) == ["base", "d", "fine", "odd"]


def test_invalid_utf8_is_reported_with_its_line(tmp_path):
    (tmp_path / "t").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(FileError, match="t: line 3 is not UTF-8 text"):
        read_text(tmp_path / "t")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_entries(tmp_path)


# A base in one shard.


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_a_restored_model_is_found_by_its_index(tmp_path, shards):
    named = {f"bert.{i}": np.full(20, i, np.float32) for i in range(4)}
    base, fine = encoder(tmp_path / "base"), encoder(tmp_path / "fine")
    write_tensors(fine / "model.safetensors", {name: leaf + 1 for name, leaf in named.items()})
    write_tensors(base / "model.safetensors", named)
    if shards:
        (base / "model.safetensors").unlink()
        files = {i: f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)}
        for i, file in files.items():
            write_tensors(base / file, dict(list(named.items())[i::shards]))
        weight_map = {name: files[i % shards] for i, name in enumerate(named)}
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    darex("prune", base, fine, tmp_path / "d", "-p", 0)
    darex("apply", base, tmp_path / "d", tmp_path / "out")
    assert names(tmp_path / "out") == sorted([CARD, *names(base)])
    with Checkpoint(tmp_path / "out") as restored:
        assert restored.tensors.keys() == named.keys()
        assert all((tensor.read() == named[name] + 1).all() for name, tensor in restored.tensors.items())
    if shards:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"] == weight_map and index["metadata"]["total_size"] == 4 * 80


# Bars.


@pytest.mark.parametrize("bar", [lambda: show.step_bar("b", 9, False), lambda: show.training_bar("b", False),
                                 lambda: show.problem_bar("b", 9, False)])  # fmt: skip
def test_no_empty_bar_remains_before_an_error(bar, capsys):
    with suppress(DarexError), bar():
        raise DarexError
    assert capsys.readouterr().err.split("\r")[-2].strip() == ""
    with bar():
        pass
    assert "b: " in capsys.readouterr().err.split("\r")[-1]


# Threads.


def test_no_thread_works_on_after_a_failure():
    """After a failure no thread may write to files that the command then closes and deletes."""
    begun, done = threading.Event(), []

    def work(item):
        if item == 0:
            begun.wait()
            raise KeyError
        begun.set()
        time.sleep(0.2)
        done.append(item)

    def make(item):
        yield work(item) or item

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyError):
            run_all(pool, work, [0, 1])
        assert done == [1]
        begun.clear()
        with pytest.raises(KeyError), closing(in_order(pool, make, [0, 1])) as results:
            for _, made in results:
                list(made)
        assert done == [1, 1]
