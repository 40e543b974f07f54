"""Settings every test runs under: offline, eight simulated CPU devices, and JAX at its strictest.

Compiled programs are kept on disk, shared by the workers and by the processes that tests start: the same tiny
models are compiled again and again, which is most of what the suite takes. They are compiled without most
optimizations, but for the modules where bits are what is tested (`OPTIMIZED`); as in use everywhere with
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test`.

A skipped test cannot fail, so the run fails where tests are skipped for a reason that `may_skip` does not
list, or more of them than it says.
"""

import os
import re
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{Path(__file__).parent.parent}/.pytest_cache/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
OPTIMIZED = ("test_adamr", "test_artifact", "test_delta", "test_demo", "test_dtypes", "test_format1",
             "test_importance", "test_lowering", "test_mask", "test_multihost", "test_sharding", "test_train",
             "test_transforms")  # fmt: skip
KEYS = ("test_bert", "test_causal_lm", "test_delta", "test_generate", "test_lora", "test_mask", "test_train")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="how many changed artifacts test_fuzz.py reads")
    parser.addoption("--oldest", action="store_true", help="the packages of the extra 'test' may be absent")


def may_skip(oldest=False):
    """The reasons that tests may be skipped for, and how many tests of a whole run at most.

    With the folder of real data 2 in all, without it 8. What `make test` installs is there wherever the suite
    runs, a GPU wherever `tests/gpu.py` does: to skip for want of them is a failure.
    """
    data = Path(os.environ.get("DAREX_DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))
    reasons = {
        r"DAREX_SMOLLM2 does not name a folder": 1,  # real weights, made by experiments/smollm2.py
        r"not (Linux|glibc)$": 2,  # test_memory.py counts memory maps and pages
        r"this file system cannot$": 1,  # exchange two directories in one step, see test_atomic.py
    }
    if not data.is_dir():
        reasons |= {r"no real (cola|sst2|mrpc|stsb) data: ": 4, r"no real GSM8K: ": 2}
    if oldest:
        reasons[r"could not import 's3fs'"] = 2  # `make test-oldest`
    return reasons


def skipped_too_often(reasons, allowed):
    """What is wrong with these reasons of skipped tests, a line each."""
    left = Counter(reasons)
    for pattern, most in allowed.items():
        own = [reason for reason in left if re.match(pattern, reason)]
        if (count := sum(left.pop(reason) for reason in own)) > most:
            yield f"{count} skipped, at most {most} may: {own[0]}"
    for reason, count in left.items():
        yield f"{count} skipped, none may: {reason}"


class Skips:
    """Counts skipped tests and modules where all reports arrive: the one process, or xdist's controller."""

    def __init__(self, allowed):
        self.allowed = allowed
        self.reasons = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.reasons.append(report.longrepr[2].removeprefix("Skipped: "))

    pytest_collectreport = pytest_runtest_logreport

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if session.exitstatus in (0, 5) and any(skipped_too_often(self.reasons, self.allowed)):
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        for line in skipped_too_often(self.reasons, self.allowed):
            terminalreporter.write_line(f"may_skip in tests/conftest.py: {line}", red=True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(may_skip(config.getoption("--oldest"))), "skips")


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_in_use(request):
    """Where bits are what is tested, XLA optimizes; where keys are drawn, JAX sees that none is used twice.

    The latter goes through Python at every call: it is not on everywhere.
    """
    name = request.module.__name__.rpartition(".")[2]
    jax.config.update("jax_debug_key_reuse", name in KEYS)
    changes = name in OPTIMIZED and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    if changes:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    if changes:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=DeprecationWarning)
        warnings.filterwarnings("default", category=ResourceWarning)
        yield


@pytest.fixture
def pair(tmp_path):
    """Base and fine-tune of a toy encoder, which is not run."""
    from tests.pairs import encoder, write

    base = write(tmp_path / "base", encoder(0, prefix="", head=False))
    return base, write(tmp_path / "fine", encoder(1), {"num_labels": 2})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Base and fine-tune of a tiny BERT and a tiny Llama, with tokenizers made on the spot."""
    transformers = pytest.importorskip("transformers")
    import jax.numpy as jnp
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    import darex_jax as dx
    from darex_jax.evaluation.classification import predict
    from darex_jax.models import init_model, read_model_config
    from darex_jax.tasks import load_task
    from darex_jax.tasks.batching import encode, evaluation_batches
    from tests.test_calibration import FAMILIES
    from tests.test_choose_q import of_two_classes

    root = tmp_path_factory.mktemp("pairs")
    for family in ("bert", "llama"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        config = FAMILIES[family] | {"vocab_size": 259, "max_position_embeddings": 512}
        config |= {"num_hidden_layers": 1} if family == "bert" else {}  # half of what compiling takes
        model, base = init_model(read_model_config(config), jax.random.key(0))
        fine = jax.tree.map(lambda x: x + 0.1 * jnp.sin(200 * x), base)
        if family == "bert":
            some = load_task("opinions").validation.select(slice(6))
            batches = evaluation_batches(encode(fast, some))
            fine = of_two_classes(model, fine, batches)
            by_class = np.array(some.texts)[predict(model, fine, batches).argmax(-1).argsort()]
        for name, params in (("base", base), ("fine", fine)):
            dx.save_params(root / family / name, params, model.config.to_hf())
            fast.save_pretrained(root / family / name)
    (root / "text").write_text(f"{by_class[0]}\n\n{by_class[1]}\n{by_class[-1]}\n", encoding="utf-8")
    return root
