"""Shared code of encoders: config fields, classifier labels, outputs."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import jax

from darex_jax.core.errors import DarexError
from darex_jax.models.config import Depth, Number, Size, Token, read_fields, refuse, shown, type_faults

Array = jax.Array

# Valid `architectures`, family names, and the body's name in a classifier.
ARCHITECTURES = {
    "bert": ("BertModel", "BertForSequenceClassification"),
    "roberta": ("RobertaModel", "RobertaForSequenceClassification"),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaForSequenceClassification"),
    "modernbert": ("ModernBertModel", "ModernBertForSequenceClassification"),
}
NAMES = {"bert": "BERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-RoBERTa", "modernbert": "ModernBERT"}
PREFIXES = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "modernbert": "model"}

# Fields read separately, with their types.
LABEL_FIELDS: dict[str, Any] = {
    "num_labels": Size | None,
    "id2label": dict | None,
    "problem_type": str | None,
}

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The config.json fields of all encoders, under config.json's own names.

    `notes` holds the fields that change no output; equality and hash ignore them, so that equivalent configs
    share one compiled program.
    """

    COMPUTED: ClassVar[tuple[str, ...]] = ("num_labels", "notes")  # all others are fields of config.json

    model_type: str = "bert"
    architectures: tuple[str, ...]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    initializer_range: Number
    pad_token_id: Token | None = 0
    num_labels: Size = 2
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        refuse(NAMES[self.model_type], self.faults())

    def faults(self) -> list[str]:
        """Problems of this config, one message each."""
        wrong = []
        known = ARCHITECTURES[self.model_type]
        if len(self.architectures) != 1 or self.architectures[0] not in known:
            wrong.append(
                f"architectures is {shown(list(self.architectures))}, supported: {', '.join(known)} "
                f"(AutoModel.from_pretrained(...).save_pretrained(...) of transformers saves any "
                f"{NAMES[self.model_type]}'s body as {known[0]})"
            )
        if self.hidden_size % self.num_attention_heads:
            wrong.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            wrong.append(f"pad_token_id is {self.pad_token_id}, the vocabulary has {self.vocab_size} rows")
        return wrong

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json: every field of the one that was read, with the same value."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.COMPUTED}
        own["architectures"] = list(self.architectures)
        if self.num_labels != 2 and not self.notes.keys() & {"id2label", "num_labels"}:
            own["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            own["label2id"] = {f"LABEL_{i}": i for i in range(self.num_labels)}
        return {**self.notes, **own}

    @property
    def prefix(self) -> str:
        """The body's name in a classifier."""
        return PREFIXES[self.model_type]

    @property
    def headless(self) -> bool:
        """Whether this is the body alone."""
        return self.architectures[0] == ARCHITECTURES[self.model_type][0]

    @property
    def problem_type(self) -> str | None:
        """The loss: "regression", "single_label_classification", "multi_label_classification" or None."""
        return self.notes.get("problem_type")

    def as_classifier(
        self, num_labels: int, problem_type: str | None = None, label_names: Sequence[str] = ()
    ) -> Self:
        """The config of a classifier with this body; unnamed labels are LABEL_0 and so on."""
        if problem_type not in (None, *PROBLEM_TYPES):
            raise DarexError(f"problem_type is {problem_type!r}, supported: {', '.join(PROBLEM_TYPES)}.")
        if num_labels < 1:
            raise DarexError(f"num_labels is {num_labels}, a classifier needs at least 1.")
        if label_names and len(label_names) != num_labels:
            raise DarexError(f"got {len(label_names)} label names for {num_labels} labels.")
        drop = {"id2label", "label2id", "num_labels", "problem_type"}
        notes = {name: value for name, value in self.notes.items() if name not in drop}
        if problem_type is not None:
            notes["problem_type"] = problem_type
        notes |= label_notes(label_names)
        return dataclasses.replace(
            self, architectures=(ARCHITECTURES[self.model_type][1],), num_labels=num_labels, notes=notes
        )

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.max_position_embeddings


def read_encoder_fields(
    cls: Any,
    hf: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any],
    inert: Collection[str],
    read: Collection[str] = (),
    ignored: Collection[str],
) -> dict[str, Any]:
    """`read_fields` of an encoder's config, including labels: the arguments of `cls`.

    Raises: ValueError that names every field which is missing, unknown or has an unsupported value.
    """
    values, notes, wrong = read_fields(
        cls,
        hf,
        computed=cls.COMPUTED,
        fixed=fixed,
        inert=inert,
        read={*read, *LABEL_FIELDS},
        ignored=ignored,
    )
    unread = type_faults({name: hf.get(name) for name in LABEL_FIELDS}, LABEL_FIELDS)
    labels, num_labels = (None, None) if unread else (hf.get("id2label"), hf.get("num_labels"))
    num_labels = num_labels or (len(labels) if labels else 2)  # transformers' default
    if labels and len(labels) != num_labels:
        unread.append(f"num_labels is {num_labels}, id2label has {len(labels)}")
    wrong += unread
    if values.get("model_type") not in NAMES:
        wrong.append(f"model_type is {shown(hf.get('model_type'))}, supported: {', '.join(NAMES)}")
    elif PREFIXES[values["model_type"]] == "roberta":
        values.setdefault("pad_token_id", 1)
    refuse(NAMES.get(str(hf.get("model_type")), "BERT"), wrong)
    return {**values, "num_labels": num_labels, "notes": notes}


def label_notes(names: Sequence[str]) -> dict[str, Any]:
    """The fields of config.json that name a classifier's classes."""
    if not names:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of a model in order, () if config.json has none."""
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    try:
        return tuple(str(names[number]) for number in sorted(names, key=int))
    except (TypeError, ValueError):
        return ()


class EncoderOutput(NamedTuple):
    """The outputs of an encoder.

    Attributes:
      last_hidden_state: [B, T, D].
      pooler_output: [B, D], or None without a pooler.
      logits: [B, labels], or None without a head.
      head_hidden: [B, D], the output of RoBERTa's `classifier.dense`; None elsewhere.
    """

    last_hidden_state: Array
    pooler_output: Array | None = None
    logits: Array | None = None
    head_hidden: Array | None = None
