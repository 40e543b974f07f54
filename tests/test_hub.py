"""push and pull against a mock of the hub's HTTP API, and model cards."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import darex_jax as dx
from darex_jax.core.errors import DarexError
from darex_jax.files.artifact import DeltaFile
from darex_jax.files.card import hub_name, model_card
from darex_jax.files.contents import contents
from tests.test_bank import darex

REPO = "someone/delta"


class Hub(BaseHTTPRequestHandler):
    """A mock of the hub for huggingface_hub: repositories in memory, one token with write access."""

    repos: ClassVar[dict] = {}
    commit = "c" * 40
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(403, {"error": "no"})
        elif self.path.startswith("/api/repos/create"):
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.repos.setdefault(name, {})
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            found = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer(200, {"files": found})
        elif self.path.startswith("/api/validate-yaml"):
            wrong = [] if b"no such name" not in content else [{"message": "base_model is no repository"}]
            self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.repos[REPO][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{REPO}/commit/{self.commit}"
            self.answer(200, {"commitUrl": url, "commitOid": self.commit})
        else:
            self.answer(404)

    def do_GET(self):
        repo, _, rest = self.path[1:].partition("/resolve/")
        file = self.repos.get(repo, {}).get(rest.partition("/")[2])
        if repo not in self.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif file is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            etag = f'"{hashlib.sha256(file).hexdigest()}"'
            self.answer(200, file, ETag=etag, X_Repo_Commit=self.commit)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    Hub.repos = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    path = tmp_path_factory.mktemp("delta") / "mine.safetensors"
    base = {"layer": {"weight": jnp.ones((64, 32))}}
    dx.save_delta(path, jax.random.key(0), jax.tree.map(jnp.sin, base), 0.9, base=base)
    return path


def called(tmp_path, endpoint, *arguments, waits=True, **env):
    """Args: waits: False retries at once, where the hub's client would wait for seconds."""
    settings = {
        "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "good", "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "*", "no_proxy": "*", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    program = "import time, darex_jax.__main__ as darex; time.sleep = lambda seconds: None; darex.main()"
    command = [sys.executable, *(("-m", "darex_jax") if waits else ("-c", program)), *map(str, arguments)]
    environment = {k: v for k, v in (os.environ | settings | env).items() if v}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_delta_goes_to_the_hub_and_comes_back(tmp_path, hub, delta):
    report = tmp_path / "measured.json"
    report.write_text(json.dumps(
        {"task": "sst2", "split": "test", "metric_name": "accuracy", "metric": 0.868, "n": 872}
    ))  # fmt: skip
    options = ("--base-model", "someone/base", "--measured", report)
    run = called(tmp_path, hub, "push", delta, REPO, *options)
    assert run.returncode == 0, run.stderr
    assert f"{hub}/{REPO}" in run.stdout
    assert Hub.repos[REPO]["delta.safetensors"] == delta.read_bytes()
    card = Hub.repos[REPO]["README.md"].decode()
    assert card.startswith('---\nbase_model: "someone/base"\nlibrary_name: "darex_jax"\n')
    assert "| sst2 | test | accuracy | 0.8680 | 872 |" in card
    assert called(tmp_path, hub, "push", delta, REPO, *options, "--dry-run", HF_TOKEN="").stdout == card
    told = called(tmp_path, hub, "push", delta, REPO, *options, "--dry-run", "--json", HF_TOKEN="")
    assert json.loads(told.stdout) == {"repo": REPO, "card": card}

    out = tmp_path / "pulled.safetensors"
    run = called(tmp_path, hub, "pull", REPO, out, HF_TOKEN="")
    assert run.returncode == 0, run.stderr
    assert out.read_bytes() == delta.read_bytes()
    assert "--overwrite" in called(tmp_path, hub, "pull", REPO, out).stderr


def test_errors_of_the_hub_are_explained(tmp_path, hub, delta):
    for message, env in (
        ("no token for the hub", {"HF_TOKEN": ""}),
        ("403. This token has no write access to it", {"HF_TOKEN": "bad"}),
        ("HF_HUB_OFFLINE is set", {"HF_HUB_OFFLINE": "1"}),
    ):
        run = called(tmp_path, hub, "push", delta, REPO, **env)
        assert run.returncode == 1 and message in run.stderr and "Traceback" not in run.stderr, run.stderr
    run = called(tmp_path, hub, "push", delta, REPO, "--base-model", "no such name")
    assert run.returncode == 1 and "a bug in" not in run.stderr, run.stderr
    assert "expected OWNER/NAME" in called(tmp_path, hub, "push", delta, "a b/c").stderr
    out = tmp_path / "out"
    assert "someone/other is not on the hub" in called(tmp_path, hub, "pull", "someone/other", out).stderr
    Hub.repos[REPO] = {}
    assert "has no delta.safetensors" in called(tmp_path, hub, "pull", REPO, out).stderr
    Hub.repos[REPO]["delta.safetensors"] = delta.read_bytes()[:-1] + b"!"
    assert "damaged" in called(tmp_path, hub, "pull", REPO, out).stderr
    assert not out.exists()


def test_a_missing_network_is_explained(tmp_path, delta):
    run = called(tmp_path, "http://127.0.0.1:9", "pull", REPO, tmp_path / "out", waits=False)
    assert run.returncode == 1 and "no connection to the hub" in run.stderr, run.stderr


def test_a_card_has_the_facts_only(delta):
    with DeltaFile(delta) as file:
        facts = contents(file)
    card = model_card(facts, "darex_jax")
    assert "base_model" not in card and "Measured" not in card and "drop_rate 0.9" in card
    hostile = model_card(facts | {"method": "a | b\n# title <script>"}, "peft", base_model='x"\nlicense: mit')
    assert "a \\| b # title &lt;script>" in hostile and "\nlicense: mit" not in hostile.split("---")[1]
    several = {"split": "test", "deltas": [{"task": "mrpc", "metric_name": "f1", "metric": 0.5, "n": 3}]}
    assert "| mrpc | test | f1 | 0.5000 | 3 |" in model_card(facts, "darex_jax", measured=[several])
    with pytest.raises(DarexError, match="must be output of darex eval --json"):
        model_card(facts, "darex_jax", measured=[{"some": "json"}])


def test_a_base_has_its_name_on_the_hub(tmp_path):
    cached = tmp_path / "models--some-one--a.base" / "snapshots" / "abc"
    assert hub_name(cached) == "some-one/a.base"
    assert hub_name(tmp_path / "models--bert-base" / "snapshots" / "abc") == "bert-base"
    assert hub_name(tmp_path / "folder") == "folder"


def test_written_models_carry_a_card(tmp_path, folders):
    base, out = folders / "bert" / "base", tmp_path / "delta"
    options = ("--method", "svd", "--bits", "4", "--drop-rate", "0.9")
    darex("prune", base, folders / "bert" / "fine", out, *options)
    darex("apply", base, out, tmp_path / "model")
    darex("export", out, tmp_path / "adapter", "--to", "peft", "--base", base)
    darex(
        "merge",
        base,
        out,
        folders / "bert" / "fine",
        tmp_path / "merged",
        "--method",
        "ties",
        "--drop-rate",
        0.5,
    )
    merged = (tmp_path / "merged" / "README.md").read_text()
    assert "A merge of 2 fine-tunes of base by `darex merge`: ties, drop_rate 0.5." in merged
    assert "| delta | 1 |" in merged
    for folder, library in (("model", "transformers"), ("adapter", "peft")):
        card = (tmp_path / folder / "README.md").read_text()
        assert (
            f'library_name: "{library}"' in card and "| method | svd" in card and 'base_model: "base"' in card
        )
