"""Who judges texts: one interface for a model of token ids and for causal language models of transformers.

S samples, L positions.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np

from imdm_scale.evaluate.metrics import SampleScores, token_scores
from imdm_scale.evaluate.ngram import NgramEvaluator

LARGEST_ORDER = 4
"""Order of the n-gram judge; blocks that are shorter have a judge of their own length."""


class Judge(Protocol):
    """Gives texts a likelihood. Loaded once, then asked for any number of texts."""

    name: str
    """Short, for tables and names of files; with the same judge always the same."""
    description: str
    """What it is, for the reader of a table."""
    identity: dict[str, Any]
    """What decides about its scores, ready for JSON."""

    def score(self, ids_SL: np.ndarray) -> SampleScores:
        """The likelihood of texts, given as token ids of the model that wrote them; of no text if S is 0."""


class NgramJudge:
    """The package's own: an n-gram model of the token ids themselves, fitted to real text."""

    def __init__(self, blocks: np.ndarray, vocab_size: int, eos_id: int, data_hash: str) -> None:
        """Fits it.

        Args:
            blocks: (number, L) token ids of real text.
            data_hash: names the data that they come from.

        Raises:
            UserError: the vocabulary is too large for n-grams of this order.
        """
        order = min(LARGEST_ORDER, blocks.shape[1])
        self._evaluator = NgramEvaluator.fit(blocks, vocab_size, order, eos_id=eos_id)
        self.description = self._evaluator.description
        self.identity = {"kind": "ngram", "order": order, "data": data_hash, "blocks": len(blocks)}
        self.name = f"ngram-{digest(self.identity)}"

    def score(self, ids_SL: np.ndarray) -> SampleScores:
        """See `Judge.score`."""
        return token_scores(self._evaluator, ids_SL)


def digest(identity: dict[str, Any]) -> str:
    """A few hexadecimal digits that differ where identities differ."""
    return hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:8]
