"""From samples and a judge to the figures of an evaluation.

L positions, S samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from imdm_scale.data.synthetic import SyntheticTask
from imdm_scale.evaluate.bootstrap import mean_interval, perplexity_interval
from imdm_scale.evaluate.diversity import distinct_n, self_bleu
from imdm_scale.evaluate.folder import Cell
from imdm_scale.evaluate.frontier import FrontierPoint, matched_perplexity
from imdm_scale.evaluate.metrics import SampleScores, sample_entropies
from imdm_scale.evaluate.synthetic import (
    factorisation_error,
    possible_share,
    token_entropy,
    total_correlation,
)

DISTINCT = (1, 2, 3, 4)
"""Lengths of the n-grams that are counted."""
TASK_SEED = 1 << 32
"""Of the task's own samples, which its measures are compared with: none of a training run."""


def text_figures(ids_SL: np.ndarray, scores: SampleScores, each: int = 1) -> dict[str, Any]:
    """What is said of texts, samples or real ones, ready for JSON. Entropies in nats.

    Args:
        each: texts that belong together, such as the continuations of one beginning; the intervals are over these
            groups.
    """
    num_samples, length = ids_SL.shape
    point = frontier_point(ids_SL, scores, each)
    return {
        "num_samples": num_samples,
        "targets": int(scores.targets_S.sum()),
        "perplexity": dataclasses.asdict(perplexity_interval(point.scores))
        if scores.targets_S.sum()
        else None,
        "entropy": dataclasses.asdict(mean_interval(point.entropy_S)),
        "distinct": {str(n): distinct_n(ids_SL, n) for n in DISTINCT if n <= length},
        "self_bleu": self_bleu(ids_SL) if num_samples > 1 else None,
    }


def frontier_point(ids_SL: np.ndarray, scores: SampleScores, each: int = 1) -> FrontierPoint:
    """Entropy and scores of each group of texts."""
    entropy_S = sample_entropies(ids_SL).reshape(-1, each).mean(axis=1)
    return FrontierPoint(entropy_S, scores.grouped(each))


def frontier_figures(points: Mapping[Cell, FrontierPoint], data_entropy: float) -> dict[str, Any]:
    """By number of steps: the perplexity at the data's entropy, or why there is none. Ready for JSON."""
    figures = {}
    for num_steps in sorted({cell.num_steps for cell in points}):
        of_steps = {cell.temperature: points[cell] for cell in sorted(points) if cell.num_steps == num_steps}
        entropies = [float(point.entropy_S.mean()) for point in of_steps.values()]
        countable = all(point.scores.targets_S.sum() for point in of_steps.values())
        found = matched_perplexity(list(of_steps.values()), data_entropy) if countable else None
        figures[str(num_steps)] = {
            "temperatures": list(of_steps),
            "data_entropy": data_entropy,
            "lowest_entropy": min(entropies),
            "highest_entropy": max(entropies),
            "perplexity": None if found is None else dataclasses.asdict(found),
        }
    return figures


def task_figures(ids_SL: np.ndarray, task: SyntheticTask) -> dict[str, Any]:
    """How far samples are from a synthetic task's law, each beside what as many samples of the task itself show.

    In nats; a factorisation error of null is infinite (an impossible sample) where `possible` is below 1, and else
    was not computed, the sequences being too many. Ready for JSON.
    """
    own_SL = task.samples(TASK_SEED, 0, len(ids_SL))
    exact = task.total_correlation()
    return {
        "possible": dataclasses.asdict(possible_share(ids_SL, task)),
        "token_entropy": token_entropy(ids_SL, task.vocab_size),
        "total_correlation": total_correlation(ids_SL),
        "factorisation_error": _finite(factorisation_error(ids_SL, task)),
        "of_task": {
            "token_entropy": token_entropy(own_SL, task.vocab_size),
            "total_correlation": total_correlation(own_SL),
            "factorisation_error": _finite(factorisation_error(own_SL, task)),
            "exact_total_correlation": exact.value,
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
