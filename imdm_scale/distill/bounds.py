"""`tools/evaluate.py likelihood`: the bound on each corpus, draw by draw. Shared by all ranks.

K draws, L positions, S sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache

import numpy as np

from imdm_scale.config.tree import DataConfig
from imdm_scale.distill.evaluation import MAIN_RANK, Evaluation
from imdm_scale.distill.likelihood import nelbo_of_draw, summary
from imdm_scale.distill.training_data import fetch_settings, told_by
from imdm_scale.errors import UserError
from imdm_scale.evaluate.console import likelihood_table
from imdm_scale.evaluate.folder import LIKELIHOOD_FILE
from imdm_scale.evaluate.judges import digest
from imdm_scale.evaluate.reference import ReferenceText, reference_text
from imdm_scale.parallel.engine import Teacher


def bounds(evaluation: Evaluation, arguments: argparse.Namespace) -> None:
    """The bound on the validation split of every corpus that is named. Collective; done draws are kept.

    Raises:
        UserError: a corpus cannot be read or is not in the model's ids, or has no validation text.
    """
    folder = evaluation.folder
    fetch = fetch_settings(DataConfig())
    most = arguments.max_blocks or sys.maxsize
    network = cache(lambda: evaluation.load_network()[0])
    shown = {}
    for path in dict.fromkeys(arguments.data):

        def found(path: str | None = path) -> tuple[ReferenceText, np.ndarray]:
            reference = reference_text(path, evaluation.model, evaluation.out, fetch, whole=True)
            return reference, reference.blocks("valid", most)

        reference, blocks_SL = told_by(MAIN_RANK, found)
        if not len(blocks_SL):
            raise UserError(f"--data {reference.name} has no validation block; give more text.")
        nelbo_KS = _draws(evaluation, arguments, network, reference, blocks_SL)
        if folder is not None:
            bound = summary(nelbo_KS)
            shown[reference.name] = {
                "name": reference.name,
                "hash": reference.manifest.hash,
                **asdict(bound),
                "perplexity": bound.perplexity,
                "seed": arguments.seed,
                "tokens_outside_blocks": reference.manifest.splits["valid"].num_dropped,
                "invocation": folder.this_invocation,
            }
            folder.keep_figures(LIKELIHOOD_FILE, reference.name, shown[reference.name])
    if shown:
        evaluation.console.print(likelihood_table(shown))
        evaluation.console.print(f"kept in {evaluation.out}")


def _draws(
    evaluation: Evaluation,
    arguments: argparse.Namespace,
    network: Callable[[], Teacher],
    reference: ReferenceText,
    blocks_SL: np.ndarray,
) -> np.ndarray:
    """The bound of each block by each draw, (K, S): those that are kept, then the others."""
    folder, num_draws = evaluation.folder, arguments.draws
    settings = {
        "data": reference.manifest.hash,
        "blocks": len(blocks_SL),
        "seed": arguments.seed,
        "draws": num_draws,
    }
    file = f"likelihood/draws-{digest(settings)}.npy"

    def kept() -> np.ndarray:
        assert folder is not None
        there = folder.array(file)
        return np.empty((0, len(blocks_SL))) if there is None else there

    nelbo_KS = told_by(MAIN_RANK, kept)
    for draw in range(len(nelbo_KS), num_draws):
        model = network()
        with evaluation.console.status(f"{reference.name}: draw {draw + 1} of {num_draws}"):
            nelbo_S = nelbo_of_draw(model, blocks_SL, arguments.batch_size, arguments.seed, draw, num_draws)
        nelbo_KS = np.concatenate([nelbo_KS, nelbo_S[None]])
        if folder is not None:
            folder.keep_array(file, nelbo_KS)
    return nelbo_KS
