"""A user's own examples: files of every format, splits, labels, and the commands that use them."""

import json

import datasets
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.cli import show
from darex_jax.core.errors import DarexError
from darex_jax.files.checkpoint import read_config
from darex_jax.models.encoder import class_names
from darex_jax.tasks.source import Source, read_material
from darex_jax.tasks.table import Table, read_completions, read_task, read_texts
from tests.test_bank import darex
from tests.test_resume import save_bert, save_llama

ALL = ("train", "validation", "test")
WORDS = ("abe", "bee", "cat", "dog", "eel")


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]
    return {
        "sentence": texts,
        "other": texts[::-1],
        "mood": ["good" if "cat" in text else "bad" for text in texts],
        "number": [int("cat" in text) for text in texts],
        "score": [text.count("cat") + 0.5 for text in texts],
    }


def write(path, columns):
    """Writes columns to a file in the format of its suffix."""
    kept = datasets.Dataset.from_dict(columns)
    suffix = path.suffix
    if suffix == ".parquet":
        kept.to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        kept.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    elif suffix == ".arrow":
        kept.save_to_disk(path.with_suffix(".dir"))
        next(path.with_suffix(".dir").glob("*.arrow")).rename(path)
    elif suffix == ".json":
        table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text(json.dumps(table))
    else:
        kept.to_json(path)
    return path


def table(path, **columns):
    return Table(data=str(path), **({"text": "sentence", "label": "mood"} | columns))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow"])
def test_every_format_holds_the_same_examples(tmp_path, suffix):
    columns = rows(40)
    task = read_task(table(write(tmp_path / f"mine{suffix}", columns), pair="other"), ALL)
    assert (task.name, task.kind, task.label_names) == ("mine", "classification", ("bad", "good"))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [32, 4, 4]
    expected = set(zip(columns["sentence"], columns["other"], columns["number"], strict=True))
    for split in (task.train, task.validation, task.test):
        assert set(zip(split.texts, split.pairs, split.labels.tolist(), strict=True)) <= expected
        assert split.labels.dtype == np.int32
    scores = read_task(table(tmp_path / f"mine{suffix}", label="score"), ALL)
    assert (scores.kind, scores.num_labels) == ("regression", 1)
    assert scores.metric_name == "pearson_and_spearman" and scores.train.labels.dtype == np.float32


def test_a_missing_split_is_held_out_and_others_stay_apart(tmp_path):
    columns = rows(40)
    columns["sentence"] = [f"{i} {text}" for i, text in enumerate(columns["sentence"])]
    whole = table(write(tmp_path / "mine.csv", columns))
    first, again = (read_task(whole, needs) for needs in (ALL, ("test",)))
    assert first.test.digest() == again.test.digest()
    splits = [set(split.texts) for split in (first.train, first.validation, first.test)]
    assert set.union(*splits) == set(columns["sentence"]) and sum(map(len, splits)) == 40
    assert set(read_texts(whole, "validation").texts) == splits[1]

    folder = tmp_path / "mine"
    folder.mkdir()
    parts = {"train-0.csv": range(15), "train-1.csv": range(15, 30), "dev.jsonl": range(30, 40)}
    for name, chosen in parts.items():
        write(folder / name, {column: [values[i] for i in chosen] for column, values in columns.items()})
    (folder / "README.md").write_text("not data")
    task = read_task(table(folder), ALL)
    assert task.validation.texts == tuple(columns["sentence"][30:])
    assert len(task.test) == 3 and set(task.test.texts) | set(task.train.texts) == set(
        columns["sentence"][:30]
    )
    write(folder / "test.parquet", columns)
    assert read_task(table(folder), ALL).test.texts == tuple(columns["sentence"])
    only = tmp_path / "only"
    only.mkdir()
    write(only / "test.csv", columns)
    for path in (only, only / "test.csv"):
        assert read_task(table(path), ("test",)).test.texts == tuple(columns["sentence"])
        for split in ("train", "validation"):  # nothing is trained on, or chosen by, what is tested
            with pytest.raises(DarexError, match=f"has test rows only, {split} rows are needed"):
                read_texts(table(path), split)
    (only / "test.csv").rename(only / "dev.csv")
    assert read_task(table(only), ALL[1:]).test.texts == tuple(columns["sentence"])
    with pytest.raises(DarexError, match="has validation rows only, train rows are needed"):
        read_texts(table(only), "train")
    write(only / "more.csv", columns)
    with pytest.raises(DarexError, match=r"more\.csv: belongs to no split; all names begin with train"):
        read_task(table(only), ALL)


def test_labels_get_the_numbers_that_a_model_has_for_them(tmp_path):
    columns = rows(40)
    path = write(tmp_path / "mine.jsonl", columns)
    turned = read_task(table(path), ALL, known=("good", "bad"))
    assert turned.label_names == ("good", "bad")
    plain = read_task(table(path), ALL)
    np.testing.assert_array_equal(turned.train.labels, 1 - plain.train.labels)
    for unnamed in ((), ("LABEL_0", "LABEL_1")):
        with pytest.raises(DarexError, match=r"'mood' has '\w+', but the model's classes have no names"):
            read_task(table(path), ALL, known=unnamed)
        assert read_task(table(path), ALL, known=unnamed, fixed=False).label_names == ("bad", "good")
    assert read_task(table(path), ALL, known=("good", "bad"), fixed=False).label_names == ("good", "bad")
    assert read_task(table(path), ALL, known=("sad", "glad"), fixed=False).label_names == ("bad", "good")
    assert read_task(table(path, label="number"), ALL).label_names == ("LABEL_0", "LABEL_1")
    assert read_task(table(path, label="number"), ALL, known=("x", "y", "z")).label_names == ("x", "y", "z")
    with pytest.raises(DarexError, match=r"'mood' has '\w+', the model's classes are sad, glad"):
        read_task(table(path), ALL, known=("sad", "glad"))
    numbered = datasets.ClassLabel(names=["yes", "no"])  # not in alphabetical order
    named = datasets.Dataset.from_dict(columns).cast_column("number", numbered)
    named.to_parquet(tmp_path / "named.parquet")
    for known in (None, ("LABEL_0", "LABEL_1"), ("yes", "no")):
        found = read_task(table(tmp_path / "named.parquet", label="number"), ALL, known=known)
        assert found.label_names == ("yes", "no")
        np.testing.assert_array_equal(
            found.train.labels, read_task(table(path, label="number"), ALL).train.labels
        )
    assert class_names({"id2label": {"1": "b", "0": "a"}}) == ("a", "b") and class_names({}) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "moods"}, r"'.*mine\.jsonl' lacks the column 'moods'; it has sentence, other"),
        ({"text": "number"}, r"mine\.jsonl', row 0 \(counted from 0\): 'number' is \d, expected a string"),
        (
            {"label": "holed"},
            r"row 3 \(counted from 0\): 'holed' is None, expected a string like those before",
        ),
        ({"label": "mixed"}, r"row 2 \(counted from 0\): 'mixed' is None, expected a finite number"),
        ({"label": "negative"}, r"'negative' has -1 to 3; classes must start at 0.*3\.0"),
        ({"metric": "pearson_and_spearman"}, "pearson_and_spearman is not a metric for classes"),
        ({"label": "score", "metric": "f1"}, "f1 is not a metric for scores"),
        ({"metric": "bleu"}, "unknown metric 'bleu'; the metrics are accuracy, matthews, f1"),
        ({"metric": "loss"}, "loss is not a metric for these columns; use accuracy"),
        ({"label": None}, r"pass their column \(--label\)"),
        ({"text": None, "label": None}, "give the columns of --data"),
        (
            {"text": None, "label": None, "prompt": "sentence"},
            "--prompt and --completion must be given together",
        ),
        ({"text": None, "prompt": "sentence", "completion": "other"}, "--pair and --label need --text"),
    ],
)
def test_errors_name_their_place(tmp_path, change, said):
    columns = rows(12)
    columns["holed"] = [*columns["mood"][:3], None, *columns["mood"][4:]]
    columns["mixed"] = [1, 2, None, *columns["number"][3:]]
    columns["negative"] = [-1, 3] * 6
    path = write(tmp_path / "mine.jsonl", columns)
    with pytest.raises(DarexError, match=said):
        read_task(table(path, **change), ALL)


def test_splits_with_other_columns_and_names_that_resemble_splits(tmp_path):
    columns = rows(20)
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "train.csv", columns)
    write(folder / "test.csv", columns | {"mood": columns["number"]})
    with pytest.raises(DarexError, match=r"'mood' has strings in train and numbers in test"):
        read_task(table(folder), ALL)
    with pytest.raises(DarexError, match=r"'score' is 1e\+39, expected a finite number"):
        read_task(
            table(write(tmp_path / "large.jsonl", columns | {"score": [1.0, 1e39] * 10}), label="score"), ALL
        )
    unknown = datasets.Dataset.from_dict(columns | {"number": [0, -1] * 10})
    unknown.cast_column("number", datasets.ClassLabel(names=["no", "yes"])).to_parquet(tmp_path / "u.parquet")
    with pytest.raises(DarexError, match=r"row 1 .*'number' is None, expected a string"):
        read_task(table(tmp_path / "u.parquet", label="number"), ALL)
    assert len(read_task(table(write(tmp_path / "devices.csv", columns)), ALL).train) == 16
    for name in ("testset.csv", "testing.csv", "test_2.csv", "devset.csv", "tests.csv"):
        with pytest.raises(DarexError, match="rows only, train rows are needed"):
            read_task(table(write(tmp_path / name, columns)), ALL)
    write(tmp_path / "a1.csv", {name: values[:11] for name, values in columns.items()})
    assert len(read_task(table(write(tmp_path / "a[1].csv", columns)), ALL).train) == 16


def test_quotes_of_tsv_and_words_for_nothing_are_text(tmp_path):
    texts = [('"said ' if i % 5 == 0 else "say ") + str(i) for i in range(20)]
    lines = [f"{text}\t{'None' if i % 2 else 'NA'}" for i, text in enumerate(texts)]
    (tmp_path / "mine.tsv").write_text("\n".join(["sentence\tmood", *lines]) + "\n")
    task = read_task(table(tmp_path / "mine.tsv"), ALL)
    assert task.label_names == ("NA", "None")
    assert sorted(t for split in (task.train, task.validation, task.test) for t in split.texts) == sorted(
        texts
    )
    (tmp_path / "mine.csv").write_text("sentence,mood\n" + "null,None\nN/A,NA\n" * 10)
    assert set(read_task(table(tmp_path / "mine.csv"), ALL).train.texts) == {"null", "N/A"}


def test_missing_data_is_explained(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(DarexError, match=r"broken\.json: cannot be read as json: "):
        read_task(table(tmp_path / "broken.json"), ALL)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: does not exist"):
        read_task(table(tmp_path / "absent.csv"), ALL)
    with pytest.raises(DarexError, match=r"nine\.csv has 9 training rows; at least ten are needed"):
        read_task(table(write(tmp_path / "nine.csv", rows(9))), ALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no file of \.parquet"):
        read_task(table(tmp_path / "empty"), ALL)
    (tmp_path / "notes.txt").write_text("a\n")
    with pytest.raises(DarexError, match=r"notes\.txt: unknown suffix"):
        read_task(table(tmp_path / "notes.txt"), ALL)

    def refuse(*args, **kwargs):
        raise ConnectionError("no")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError,
        match=r"someone/else: is not a local file or folder, and cannot be loaded from the Hugging Face hub",
    ):
        read_task(table("someone/else"), ALL)
    with pytest.raises(DarexError, match="from one place"):
        Source(task="sst2", table=table("x.csv"))


def test_a_data_set_of_the_hub_has_splits_of_its_own(monkeypatch):
    held = {
        name: datasets.Dataset.from_dict(rows(n)) for name, n in (("train", 20), ("test", 5), ("extra", 3))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(held))
    task = read_task(table("someone/moods", metric="f1"), ALL)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 5)
    assert (task.name, task.metric_name) == ("moods", "f1")


def test_an_encoder_is_trained_scored_and_pruned_on_ones_own_data(tmp_path, monkeypatch):
    base = save_bert(tmp_path / "base")
    data = write(tmp_path / "moods.csv", rows(60))
    own = ("--data", data, "--text", "sentence", "--label", "mood")
    fine = tmp_path / "fine"
    recipe = ("--steps", 40, "--batch-size", 8, "--learning-rate", 3e-3, "--no-dropout")
    trained = json.loads(darex("train", base, fine, *own, "--metric", "f1", *recipe, "--json").stdout)
    assert trained["task"] == "moods" and trained["metric_name"] == "f1"
    assert read_config(fine)["id2label"] == {"0": "bad", "1": "good"}
    monkeypatch.setattr(show, "HALF", 0.0)
    seen = darex("eval", fine, *own, "--metric", "f1", "--json")
    assert "of memory; eval needs about 2.5 times the model" in seen.stderr
    scored = json.loads(seen.stdout)
    assert scored["metric"] == trained["test"] and scored["n"] == 6
    moved = data.rename(data.with_stem("elsewhere"))
    again = json.loads(darex("repeat", fine, "--data-dir", moved, "--json").stdout)
    assert again["same"]
    moved.rename(data)
    # A fine-tune is trained on with the classes that its head has, whatever their order.
    config = json.loads((fine / "config.json").read_text())
    config |= {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (fine / "config.json").write_text(json.dumps(config))
    darex("train", fine, tmp_path / "more", *own, "--steps", 1, "--learning-rate", 1e-9)
    assert read_config(tmp_path / "more")["id2label"] == config["id2label"]
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (fine / "config.json").write_text(json.dumps(config))
    # Another file has the labels in another order: the model's names determine the indices.
    flipped = {name: values[::-1] for name, values in rows(60).items()}
    turned = write(tmp_path / "turned.jsonl", flipped)
    whole = [json.loads(darex("eval", fine, "--data", d, *own[2:], "--json").stdout) for d in (data, turned)]
    assert {w["metric_name"] for w in whole} == {"accuracy"}

    q = json.loads(
        darex("find-q", base, fine, "-p", 0.9, *own, "--out", tmp_path / "q.json", "--json").stdout
    )
    assert q["objective"] == "labels" and q["labels"] and q["data"] == str(data)
    assert q["manifest"]["options"]["table"]["label"] == "mood"
    delta = tmp_path / "delta"
    out = darex(
        "prune", base, fine, delta, "--method", "wanda", "-p", 0.5, "--data", data, "--text", "sentence"
    )
    assert "wanda" in out.output
    assert json.loads(darex("eval", base, "--delta", delta, *own, "--json").stdout)["n"] == 6
    advice = json.loads(
        darex("recommend", base, fine, "--size", "3x", *own[:4], "--steps", 3, "--json").stdout
    )
    assert advice["measure"] == "agreement of predictions" and advice["held_out"]
    for command, said in (
        (("eval", fine, "--label", "mood"), "--label is a column or a metric of --data"),
        (("eval", fine, "--text", "mood"), "--text is a column of --data"),
        (("train", base, tmp_path / "x", *own, "--task", "sst2"), "pass either --task or --data"),
        (("eval", fine, *own, "--task", "sst2"), "pass either --task or --data"),
        (
            ("eval", fine, *own, "--records", tmp_path / "r"),
            "--records is for problems: pass --task gsm8k or",
        ),
        (("eval", fine, "--difficulty", 3), "--difficulty is of generated problems"),
        (("eval", fine, "--max-new-tokens", 3), "--max-new-tokens is for problems"),
        (("eval", fine, *own, "--seed", 3), "--seed is of generated tasks"),
        (("eval", fine, "--task", "gsm8k", "--marker", ""), "--marker is what an answer comes after"),
        (("check", base, fine, "--params", "ema"), "--params is a branch of an orbax checkpoint"),
        (("train", base, tmp_path / "x", *own, "--norm", "l1"), "--norm is of --optimizer adamr"),
        (("train", base, tmp_path / "x", *own, "--rslora"), "--rslora needs --lora-rank"),
    ):
        assert said in darex(*command, code=2).output


def test_a_decoder_is_trained_and_scored_on_prompts_and_completions(tmp_path):
    base = save_llama(tmp_path / "base")
    columns = {
        "ask": [f"What is {i} + 1?" for i in range(30)],
        "say": [f" It is {i + 1}." for i in range(30)],
    }
    data = write(tmp_path / "sums.jsonl", columns)
    own = ("--data", data, "--prompt", "ask", "--completion", "say")
    prompts, completions = read_completions(Table(data=str(data), prompt="ask", completion="say"), ALL)[
        "test"
    ]
    assert len(prompts) == 3 and all(completions[i] == columns["say"][columns["ask"].index(p)]
                                     for i, p in enumerate(prompts))  # fmt: skip
    fine = tmp_path / "fine"
    lora = ("--steps", 6, "--batch-size", 8, "--lora-rank", 2, "--json")
    trained = json.loads(darex("train", base, fine, *own, "--metric", "exact_match", *lora).stdout)
    assert trained["metric_name"] == "exact match" and trained["validation"] == trained["validation_answers"]
    loss = darex("train", base, tmp_path / "x", *own, "--metric", "loss", *lora, code=1).stderr
    assert "pass --metric exact_match or token_accuracy" in loss
    darex("merge-adapter", base, fine, tmp_path / "merged")
    scored = json.loads(darex("eval", tmp_path / "merged", *own, "--metric", "loss", "--json").stdout)
    assert scored["metric"] == scored["loss"] > 0 and scored["n"] == 3
    assert 0 <= scored["exact_match"] <= scored["token_accuracy"] <= 1
    params = dx.load_params(tmp_path / "merged")
    params["model"]["norm"]["weight"] *= np.nan
    dx.save_params(tmp_path / "nan", params, companions_from=tmp_path / "merged")
    assert "NaN or infinite" in darex("eval", tmp_path / "nan", *own, "--json", code=1).stderr
    for asked in ((), ("--data", data, "--text", "ask", "--label", "say")):
        told = " ".join(darex("eval", tmp_path / "merged", *asked, code=1).output.split())
        assert "is for encoders, but" in told and "is a llama" in told
    known = Table(data=str(data), text="ask")
    material = read_material(base, Source(table=known, limit=4), "train")
    assert len(material.encoded) == 4 and material.encoded.prompt_lengths == [1] * 4
    orders = [
        [batch["input_ids"].tolist() for batch in read_material(base, source, "train").epoch(0)]
        for source in (Source(table=known), Source(table=known), Source(table=known, seed=1))
    ]
    assert orders[0] == orders[1] != orders[2]
    encoder, asked = save_bert(tmp_path / "bert"), Table(data=str(data), prompt="ask", completion="say")
    with pytest.raises(DarexError, match=r"pass the text column \(--text\)"):
        read_material(encoder, Source(table=asked), "train")
