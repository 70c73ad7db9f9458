"""How a run's model was made, for the card beside its weights."""

from __future__ import annotations

from typing import Any


def run_facts(
    method: str, step: int, data: dict[str, Any], began_as: str, weights: str, made_by: dict[str, Any]
) -> dict[str, object]:
    """Lines of a card, the same whether the run or a conversion of its checkpoint writes it.

    Args:
        method: `method.name`.
        step: updates done.
        data: fields of the place in the data (`data.place.Place`).
        began_as: where the first weights came from.
        weights: which of the run's they are.
        made_by: the record of `evaluate.provenance`.
    """
    return {
        "method": method,
        "updates": step,
        "samples": data["samples"],
        "data": data["data_hash"],
        "began as": began_as,
        "weights": weights,
        "command": made_by.get("command"),
        "commit": made_by.get("commit"),
        "versions": made_by.get("versions"),
    }
