"""Kept samples under a judge. All ranks score, each a part; a judge is loaded once.

L positions, S samples.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from imdm_scale.distill.evaluation import MAIN_RANK, Evaluation
from imdm_scale.distill.training_data import told_by
from imdm_scale.evaluate.causal_judge import CausalJudge
from imdm_scale.evaluate.console import scores_table
from imdm_scale.evaluate.folder import SCORES_FILE, Cell
from imdm_scale.evaluate.frontier import FrontierPoint
from imdm_scale.evaluate.judges import Judge, NgramJudge
from imdm_scale.evaluate.mauve_score import MauveScorer
from imdm_scale.evaluate.metrics import SampleScores
from imdm_scale.evaluate.reference import ReferenceText
from imdm_scale.evaluate.scores import frontier_figures, frontier_point, task_figures, text_figures

NGRAM = "ngram"
"""Name of the judge that needs no model."""


def score(
    evaluation: Evaluation,
    arguments: argparse.Namespace,
    cells: Sequence[Cell],
    num_samples: int,
    reference: ReferenceText,
    *,
    text_length: int | None,
    each: int,
) -> None:
    """Scores the first `num_samples` samples of the cells and as many validation blocks, and shows the table.

    Collective. What the judge has scored before is not scored again, and stays beside the cells that are asked for.

    Args:
        text_length: tokens to which texts are cut; None leaves them whole.
        each: samples that continue one real beginning; 1 where there are none such.

    Raises:
        UserError: no such judge, or no such text.
    """
    folder, console, tokenizer = evaluation.folder, evaluation.console, evaluation.model.tokenizer
    judge = _judge(evaluation, arguments, reference)
    data_name = f"data-{reference.manifest.hash[:12]}"
    texts: dict[str, np.ndarray] = told_by(
        MAIN_RANK, lambda: {data_name: reference.blocks("valid", num_samples)[:, :text_length]}
    )
    cells = sorted({*cells, *told_by(MAIN_RANK, lambda: _scored_before(evaluation, judge, num_samples))})
    points: dict[Cell, FrontierPoint] = {}
    by_cell: dict[str, Any] = {}
    scorer = None
    if folder is not None and arguments.mauve:
        human = [tokenizer.decode(ids_L) for ids_L in texts[data_name][: num_samples // each].tolist()]
        gpu = evaluation.device.index if evaluation.device.type == "cuda" else -1
        length = text_length or evaluation.model.architecture.length
        scorer = MauveScorer(human, arguments.mauve_model, length, -1 if gpu is None else gpu)
    data_scores = _scored(evaluation, judge, data_name, texts[data_name])
    for cell in cells:
        with console.status(f"scoring {cell.name}"):
            ids_SL = told_by(MAIN_RANK, lambda cell=cell: folder.samples(cell)[:num_samples, :text_length])  # type: ignore[union-attr,misc]
            scores = _scored(evaluation, judge, cell.name, ids_SL)
            if folder is None:
                continue
            points[cell] = frontier_point(ids_SL, scores, each)
            figures = {
                "num_steps": cell.num_steps,
                "temperature": cell.temperature,
                **text_figures(ids_SL, scores, each),
            }
            if reference.task is not None:
                figures["task"] = task_figures(ids_SL, reference.task)
            if scorer is not None:
                sampled = [tokenizer.decode(ids_L) for ids_L in ids_SL.tolist()]
                figures["mauve"] = dataclasses.asdict(scorer.score(sampled))
            by_cell[cell.name] = figures
    if folder is None:
        return
    data = {
        "name": reference.name,
        "hash": reference.manifest.hash,
        **text_figures(texts[data_name], data_scores),
    }
    kept = {
        "judge": {"description": judge.description, **judge.identity},
        "invocation": folder.this_invocation,
        "text_length": text_length,
        "mauve_model": arguments.mauve_model if arguments.mauve else None,
        "data": data,
        "cells": by_cell,
        "frontier": frontier_figures(points, data["entropy"]["value"]),
    }
    folder.keep_figures(SCORES_FILE, judge.name, kept)
    console.print(scores_table(kept))
    console.print(f"samples and scores kept in {evaluation.out}")


def _judge(evaluation: Evaluation, arguments: argparse.Namespace, reference: ReferenceText) -> Judge:
    model = evaluation.model
    with evaluation.console.status(f"loading the judge {arguments.judge}"):
        if arguments.judge != NGRAM:
            return CausalJudge(
                arguments.judge, model.tokenizer, evaluation.device, arguments.judge_batch_size
            )
        max_blocks = max(1, arguments.data_tokens // model.architecture.length)
        blocks = told_by(MAIN_RANK, lambda: reference.blocks("train", max_blocks))
        return NgramJudge(blocks, model.tokenizer.vocab_size, model.tokenizer.eos_id, reference.manifest.hash)


def _scored_before(evaluation: Evaluation, judge: Judge, num_samples: int) -> list[Cell]:
    """Cells of which the judge knows that many samples."""
    folder = evaluation.folder
    assert folder is not None
    cells = [Cell(noted["num_steps"], noted["temperature"]) for noted in folder.cells.values()]
    known = {cell: folder.token_scores(judge.name, cell.name) for cell in cells}
    return [
        cell for cell, scores_S2 in known.items() if scores_S2 is not None and len(scores_S2) >= num_samples
    ]


def _scored(evaluation: Evaluation, judge: Judge, name: str, ids_SL: np.ndarray) -> SampleScores:
    """What the judge says of texts, on every rank; kept under `name`, and only what is not there yet is asked."""
    folder = evaluation.folder

    def kept() -> np.ndarray:
        assert folder is not None
        there = folder.token_scores(judge.name, name)
        return np.empty((0, 2)) if there is None else there

    there_S2 = told_by(MAIN_RANK, kept)
    if len(there_S2) < len(ids_SL):
        mine = np.array_split(ids_SL[len(there_S2) :], dist.get_world_size())[dist.get_rank()]
        part = judge.score(mine)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, np.stack([part.nll_S, part.targets_S], axis=1))
        there_S2 = np.concatenate([there_S2, *parts])
        if folder is not None:
            folder.keep_token_scores(judge.name, name, there_S2)
    used_S2 = there_S2[: len(ids_SL)]
    return SampleScores(used_S2[:, 0], used_S2[:, 1].astype(np.int64))
