"""The generated task, the GLUE protocol, and batches."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

from darex_jax.tasks import GLUE_TASKS, Examples, load_task
from darex_jax.tasks.batching import BUCKETS, Encoded, encode, evaluation_batches, training_batches
from darex_jax.tasks.lines import read_lines
from darex_jax.tasks.opinions import BAD, GOOD


@pytest.fixture(scope="module")
def opinions():
    return load_task("opinions")


# The generated task.


def test_opinions_is_a_function_of_its_seed(opinions):
    text = "\n".join(opinions.test.texts).encode()
    assert hashlib.sha256(text).hexdigest()[:16] == "3e0fa25c74c7ef9a"  # another one: raise EDITION
    assert load_task("opinions").train.texts == opinions.train.texts
    assert load_task("opinions", seed=1).train.texts[:100] != opinions.train.texts[:100]


def test_no_seed_trains_on_opinions_that_another_tests(opinions):
    other = load_task("opinions", seed=1)
    assert set(other.test.texts + other.validation.texts).isdisjoint(opinions.train.texts)
    assert set(other.test.texts).isdisjoint(opinions.validation.texts)


def test_opinions_is_balanced_distinct_and_short(opinions):
    splits = (opinions.train, opinions.validation, opinions.test)
    assert [len(s) for s in splits] == [12_000, 500, 1_000]
    for split in splits:
        assert split.labels.dtype == np.int32 and split.labels.mean() == 0.5 and split.pairs is None
    texts = [text for split in splits for text in split.texts]
    assert len(set(texts)) == len(texts)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 4 and max(lengths) <= 20
    assert all(re.fullmatch(r"[a-z' ,;]+\.", text) and "  " not in text for text in texts)


def test_opinions_of_plain_assertions_are_what_they_say(opinions):
    plain = re.compile(r"the \w+ was (\w+)\.")
    found = [
        (m[1], label) for t, label in zip(*_columns(opinions.train), strict=True) if (m := plain.fullmatch(t))
    ]
    assert len(found) > 10
    assert all((word in GOOD) == label and (word in BAD) != label for word, label in found)


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (r"although the \w+ was \w+, the \w+ was (\w+)\.", "it"),
        (r"the \w+ was \w+, (?:but|yet) the \w+ was (\w+)\.", "it"),
        (r"the \w+ was (\w+), (?:although|though|even though) the \w+ was \w+\.", "it"),
        (r"the \w+ was not (\w+)\.", "its opposite"),
        (r"i do not think the \w+ was (\w+)\.", "its opposite"),
        (r"nobody can deny that the \w+ was (\w+)\.", "it"),
    ],
)
def test_opinions_follow_the_clause_that_decides(opinions, pattern, group):
    texts, labels = _columns(opinions.train)
    found = [(m[1], bool(y)) for t, y in zip(texts, labels, strict=True) if (m := re.fullmatch(pattern, t))]
    assert found
    assert all((word in GOOD) == (label if group == "it" else not label) for word, label in found)


def test_counting_words_does_not_solve_opinions(opinions):
    """A linear bag of words stays far below the 0.98 that a fine-tuned encoder reaches."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    for longest, ceiling in ((1, 0.70), (2, 0.82)):
        words = CountVectorizer(token_pattern=r"[^\s]+", ngram_range=(1, longest))
        linear = LogisticRegression(max_iter=1000).fit(
            words.fit_transform(opinions.train.texts), opinions.train.labels
        )
        assert linear.score(words.transform(opinions.test.texts), opinions.test.labels) < ceiling


def _columns(split: Examples):
    return split.texts, split.labels


# GLUE.


def write_glue(folder: Path, name: str, train: int = 30, validation: int = 7) -> None:
    """Synthetic parquet files with the hub's columns."""
    from datasets import Dataset

    folder.mkdir(parents=True)
    columns = ("sentence",) if name in ("cola", "sst2") else ("sentence1", "sentence2")
    for split, rows in (("train", train), ("validation", validation)):
        data = {c: [f"{c} {split} {i}" for i in range(rows)] for c in columns}
        labels = [i / 7 if name == "stsb" else i % 2 for i in range(rows)]
        Dataset.from_dict({**data, "label": labels, "idx": list(range(rows))}).to_parquet(
            folder / f"{split}.parquet"
        )


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_glue_protocol(name, tmp_path):
    write_glue(tmp_path / name, name)
    task = load_task(name, tmp_path)
    order = np.random.RandomState(0).permutation(30)
    column = "sentence" if name in ("cola", "sst2") else "sentence1"
    assert task.validation.texts == tuple(f"{column} train {i}" for i in order[:3])
    assert task.train.texts == tuple(f"{column} train {i}" for i in order[3:])
    assert task.test.texts == tuple(f"{column} validation {i}" for i in range(7))
    assert (task.test.pairs is None) == (column == "sentence")
    assert task.kind == ("regression" if name == "stsb" else "classification")
    assert task.num_labels == (1 if name == "stsb" else 2)
    assert task.test.labels.dtype == (np.float32 if name == "stsb" else np.int32)
    assert load_task(name, tmp_path / name).train.texts == task.train.texts  # the task's folder


def test_missing_data_is_explained(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"train\*.parquet and validation\*.parquet of 'cola' are not in"
    ):
        load_task("cola", tmp_path)
    with pytest.raises(
        ValueError, match="unknown task 'qnli'; the tasks are opinions, cola, sst2, mrpc, stsb"
    ):
        load_task("qnli")
    write_glue(tmp_path / "cola", "cola")
    with pytest.raises(ValueError, match="lacks the column 'sentence1' of 'mrpc'"):
        load_task("mrpc", tmp_path / "cola")
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train.parquet' cannot be read as parquet"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize(
    ("name", "column", "values", "said"),
    [
        ("cola", "sentence", lambda x: None, "None, expected a string"),
        ("mrpc", "sentence2", lambda x: None, "None, expected a string"),
        ("cola", "label", lambda x: None, "None, expected an integer from 0 to 1"),
        ("cola", "label", lambda x: -1, "-1, expected an integer from 0 to 1"),
        ("sst2", "label", lambda x: 2, "2, expected an integer from 0 to 1"),
        ("stsb", "label", lambda x: float("nan"), "nan, expected a finite number"),
        ("stsb", "label", lambda x: 1e300, "1e+300, expected a finite number"),
        ("stsb", "label", lambda x: None, "None, expected a finite number"),
        # Columns of another type: the error names their first row.
        ("mrpc", "sentence2", [7] * 30, "7, expected a string"),
        ("cola", "label", ["1"] * 30, "'1', expected an integer from 0 to 1"),
        ("sst2", "label", [1.0] * 30, "1.0, expected an integer from 0 to 1"),
        ("stsb", "label", ["3.5"] * 30, "'3.5', expected a finite number"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_column_and_row(name, column, values, said, tmp_path):
    from datasets import Dataset

    folder = tmp_path / name
    write_glue(folder, name)
    data = Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(tmp_path / "cache")).to_dict()
    (folder / "train.parquet").unlink()
    data[column] = values if isinstance(values, list) else [*data[column][:16], values(0), *data[column][17:]]
    for part, rows in (("train-0", slice(0, 12)), ("train-1", slice(12, 30))):
        Dataset.from_dict({c: x[rows] for c, x in data.items()}).to_parquet(folder / f"{part}.parquet")
    part, row = ("train-0", 0) if isinstance(values, list) else ("train-1", 4)
    with pytest.raises(ValueError) as error:
        load_task(name, tmp_path)
    place = f"'{folder}/{part}.parquet', row {row} (counted from 0)"
    assert str(error.value) == f"{place}: '{column}' is {said}."


def test_files_without_rows_are_named(tmp_path):
    write_glue(tmp_path / "cola", "cola", validation=0)
    with pytest.raises(ValueError, match=r"validation.parquet' has no rows"):
        load_task("cola", tmp_path)


def test_lines_of_a_text_file(tmp_path):
    file = tmp_path / "texts"
    file.write_bytes("\ufeffone\r\n \r\ntwo\u2028still two\n\nthree".encode())
    assert read_lines(file) == ["one", "two\u2028still two", "three"]
    file.write_bytes("eins\nzwei\ndr\xfcben".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts: line 3 is not UTF-8"):
        read_lines(file)
    for nothing in (b"", b" \n\n", b"\xef\xbb\xbf\n"):
        file.write_bytes(nothing)
        with pytest.raises(ValueError, match=r"texts: has no line of text"):
            read_lines(file)


def test_a_hub_out_of_reach_is_explained(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"'nyu-mll/glue' cannot .*\(ConnectionError\).*--data-dir.*'opinions'"
    ):
        load_task("cola")


ROWS = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500)}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_real_glue(name):
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("DAREX_DATA_DIR", root.parent / "shared" / "data"))
    if not (folder / name).is_dir():
        pytest.skip(f"no real {name} data: set DAREX_DATA_DIR to a folder that holds {name}/train.parquet")
    task = load_task(name, folder)
    train, test = ROWS[name]
    assert (len(task.train), len(task.validation), len(task.test)) == (train - train // 10, train // 10, test)
    if name == "stsb":
        assert task.test.labels.min() >= 0 and task.test.labels.max() == 5.0
    else:
        assert set(task.train.labels.tolist()) == {0, 1}


# Batches.


def encoded(n: int, longest: int = 40) -> Encoded:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 100, rng.integers(3, longest)).tolist() for _ in range(n)]
    return Encoded(ids, [[0] * len(row) for row in ids], np.arange(n, dtype=np.int32), pad_id=0)


@pytest.mark.parametrize(
    "make", [evaluation_batches, lambda e, b: list(training_batches(e, b, seed=0, epoch=0))]
)
def test_batches_hold_every_row_once(make):
    data = encoded(150)
    batches = make(data, 32)
    assert len(batches) == 5 and all(b["input_ids"].shape[0] == 32 for b in batches)
    assert {b["input_ids"].shape[1] for b in batches} <= set(BUCKETS)
    real = np.concatenate([b["index"][b["weight"] > 0] for b in batches])
    assert sorted(real.tolist()) == list(range(150))
    for batch in batches:
        assert np.array_equal(batch["labels"], batch["index"])
        for ids, mask, i in zip(batch["input_ids"], batch["attention_mask"], batch["index"], strict=True):
            assert ids[mask == 1].tolist() == data.input_ids[i] and not ids[mask == 0].any()


def test_training_order_follows_from_seed_and_epoch():
    data = encoded(300)

    def order(seed, epoch):
        return np.concatenate([b["index"] for b in training_batches(data, 16, seed, epoch)]).tolist()

    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_encode_truncates_and_joins_pairs(tiny_tokenizer):
    single = encode(tiny_tokenizer, Examples(("a b c d e",), None, np.zeros(1, np.int32)), max_length=4)
    assert [tiny_tokenizer.decode(ids) for ids in single.input_ids] == ["[CLS] a b [SEP]"]
    pair = encode(tiny_tokenizer, Examples(("a b",), ("c",), np.zeros(1, np.int32)))
    assert tiny_tokenizer.decode(pair.input_ids[0]) == "[CLS] a b [SEP] c [SEP]"
    assert pair.token_type_ids == [[0, 0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="max_length must be between 1 and 128, got 200"):
        encode(tiny_tokenizer, Examples(("a",), None, np.zeros(1, np.int32)), max_length=200)
    with pytest.raises(ValueError, match="no examples"):
        encode(tiny_tokenizer, Examples((), None, np.zeros(0, np.int32)))


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    """A word-level tokenizer saved and loaded as a checkpoint's would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from darex_jax.tasks.batching import load_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcde"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    return load_tokenizer(folder)
