"""Split expressions, "train[:-100000]", and what each corpus calls training and validation text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.errors import UserError

Role = Literal["train", "valid"]

NONE = "none"
"""The expression of a corpus that has no such split."""
HELD_OUT = "the last 1%"
"""The rule of a corpus without validation text: the last hundredth of train, at least one document, is it."""
VALIDATION_NAMES = ("validation", "valid", "val", "dev")

EXPRESSION = re.compile(r"\s*([\w.-]+?)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


@dataclass(frozen=True)
class Selection:
    """Documents `start` to `stop` of the split `name`; `stop` is None where only reading shows the end."""

    name: str
    start: int
    stop: int | None


def hub_rule(path: str, names: Mapping[str, int | None]) -> dict[Role, str]:
    """Training and validation text of a dataset of the hub, as the literature has them.

    The last 100,000 documents of OpenWebText, and LM1B's test split, serve for validation in MDLM
    (arXiv 2406.07524) and before it.
    """
    dataset = path.rstrip("/").rpartition("/")[2].lower()
    if dataset.endswith("openwebtext"):
        return {"train": "train[:-100000]", "valid": "train[-100000:]"}
    if "lm1b" in dataset:
        return {"train": "train", "valid": "test"}
    if "wikitext" in dataset or "ptb" in dataset:
        return {"train": "train", "valid": "validation"}
    if "lambada" in dataset:
        return {"train": NONE, "valid": "test"}
    return _rule_of_names(names, VALIDATION_NAMES)


def local_rule(names: Mapping[str, int | None]) -> dict[Role, str]:
    """Training and validation text of local files: their own validation split, or else the last 1%."""
    return _rule_of_names(names, (*VALIDATION_NAMES, "test"))


def _rule_of_names(names: Mapping[str, int | None], validation: tuple[str, ...]) -> dict[Role, str]:
    own = [name for name in validation if name in names]
    return {"train": "train", "valid": own[0]} if own else {"train": HELD_OUT, "valid": HELD_OUT}


def select(
    role: Role,
    given: Mapping[Role, str | None],
    rule: Mapping[Role, str],
    counts: Mapping[str, int | None],
    label: str,
) -> Selection | None:
    """What `role` is in a corpus; None if the corpus has no such split.

    Args:
        given: the expressions that were asked for; None takes the corpus' own.
        rule: the corpus' own expressions.
        counts: the number of documents of each split that there is, None where it is not known.
        label: the corpus, for messages.

    Raises:
        UserError: the expression is none, or names no split, or needs a number that is not known, or nothing is
            left, or the corpus' own split holds documents of the one that was asked for.
    """
    chosen = _resolve(role, given[role] or rule[role], counts, label)
    other: Role = "valid" if role == "train" else "train"
    if (given["train"] is None) == (given["valid"] is None) or chosen is None:
        return chosen
    against = _resolve(other, given[other] or rule[other], counts, label)
    if against and chosen.name == against.name and _overlap(chosen, against):
        asked, missing = (role, other) if given[role] else (other, role)
        raise UserError(
            f"{asked} is {given[asked]!r}, which shares documents of {label} with what {missing} is by default; "
            f"set {missing} too ({NONE!r} for none)."
        )
    return chosen


def _overlap(a: Selection, b: Selection) -> bool:
    return (b.stop is None or a.start < b.stop) and (a.stop is None or b.start < a.stop)


def _resolve(role: Role, expression: str, counts: Mapping[str, int | None], label: str) -> Selection | None:
    if expression == NONE:
        return None
    if expression == HELD_OUT:
        expression = _held_out(role, counts, label)
    match = EXPRESSION.fullmatch(expression)
    if match is None:
        raise UserError(
            f"{role} is {expression!r}, but must be the name of a split, or part of one such as train[:-1000], "
            f"train[5%:] or test[100:200], or {NONE!r}."
        )
    name = _split_name(role, match[1], counts, label)
    count = counts[name]
    start, stop = (_bound(bound, count, f"{role} is {expression!r}", label) for bound in match.groups()[1:])
    start = start or 0
    stop = count if stop is None else stop
    if stop is not None and start >= stop:
        size = "" if count is None else f", which holds {count} document(s)"
        raise UserError(
            f"{role} is {expression!r}, but no document is left of split {name} of {label}{size}; choose other bounds."
        )
    return Selection(name, start, stop)


def _held_out(role: Role, counts: Mapping[str, int | None], label: str) -> str:
    count = counts.get("train", 0)
    if count is None:
        raise UserError(
            f"The validation text of {label} is the last 1% of its documents, but a streamed source does not tell "
            "how many there are; set train and valid to bounds counted from the start, such as train[1000:] and "
            "train[:1000], or do not stream."
        )
    if "train" in counts and count < 2:
        raise UserError(
            f"There are {count} document(s) in {label}, and at least 2 are needed, one of them for validation; add "
            f"documents, separate those of a text file by blank lines, or set train to 'train' and valid to {NONE!r}."
        )
    held_out = max(1, count // 100)
    return f"train[:-{held_out}]" if role == "train" else f"train[-{held_out}:]"


def _split_name(role: Role, name: str, counts: Mapping[str, int | None], label: str) -> str:
    alike = [other for other in VALIDATION_NAMES if name in VALIDATION_NAMES and other in counts]
    if name in counts or alike:
        return name if name in counts else alike[0]
    question = did_you_mean(name, counts, f"set {role} to one of them, or to 'none'.")
    raise UserError(f"{role} is split {name!r}, but {label} has the splits {sorted(counts)}; {question}")


def _bound(bound: str | None, count: int | None, setting: str, label: str) -> int | None:
    """A bound as a number from 0 to `count`; per cents are rounded to the nearest document, as `datasets` does."""
    if bound is None:
        return None
    number = int(bound.rstrip("%"))
    if count is None:
        if bound.endswith("%") or number < 0:
            raise UserError(
                f"{setting}, where {bound} needs the number of documents, but {label} is streamed and does not "
                "tell it; use bounds counted from the start, or do not stream."
            )
        return number
    from_end = number < 0
    if bound.endswith("%"):
        number = round(number * count / 100)
    return min(max(number + count if from_end else number, 0), count)
