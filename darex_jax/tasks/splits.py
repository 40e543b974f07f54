"""The split of a generated example, a function of its text."""

import hashlib

GENERATED = ("opinions", "word-problems")
EDITION = 2  # of what they generate: results of another one are not comparable


def edition(task: str) -> dict[str, int]:
    """What the digest of anything made from a task's examples adds; nothing for real data."""
    return {"edition": EDITION} if task in GENERATED else {}


def split_of(text: str) -> str:
    """ "test" and "validation" for an eighth of all texts each, else "train".

    A generated task draws the texts of a split from those of this name only. So what one seed (or difficulty)
    trains on is never what another one tests on.
    """
    first = hashlib.sha256(text.encode()).digest()[0]
    return "test" if first < 32 else "validation" if first < 64 else "train"
