"""The table at the end of a run: what each network writes in few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from imdm_scale.config.layout import RunLayout
from imdm_scale.config.tree import EvaluateConfig
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.distill.sampling import sample_texts
from imdm_scale.distill.training_data import TrainingData
from imdm_scale.evaluate.judges import LARGEST_ORDER
from imdm_scale.evaluate.ngram import NgramEvaluator
from imdm_scale.evaluate.quality import plot_quality, quality_table, render_table, show_samples, write_json
from imdm_scale.parallel.engine import ModelEngine


def report_quality(
    models: Mapping[str, ModelEngine | None],
    layout: RunLayout,
    evaluate: EvaluateConfig,
    data: TrainingData,
    tokenizer: Tokenizer,
    order: TokenOrder,
    run_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Sample from every model at every number of steps; the student's first rank scores, prints, writes and plots.

    Collective over all ranks of the run. Writes quality.json, quality.png and samples.npz to `run_dir`.

    Args:
        models: by role; None where this rank has no part in the network. The student is sampled as it was trained to
            be, a teacher by ancestral sampling.
        order: in which the student draws its tokens.

    Returns:
        The table on the student's first rank, an empty dictionary elsewhere.
    """
    main_rank = layout.student.ranks[0]
    roles = {role.role: role for role in layout.roles}
    mine: dict[tuple[str, int], torch.Tensor] = {}
    for role, model in models.items():
        for num_steps in evaluate.steps:
            if model is not None:
                with console.status(f"sampling: {role}, {num_steps} steps"):
                    mine[role, num_steps] = sample_texts(
                        model,
                        SamplerSettings(num_steps=num_steps, temperature=evaluate.temperature),
                        evaluate.num_samples,
                        evaluate.batch_size,
                        evaluate.seed,
                        data.bos_id,
                        sampler=None if role == "student" else "ancestral",
                        rank_V=order.rank_V if role == "student" else None,
                    )
    # Roles on ranks of their own have sampled at the same time; now their texts come together.
    samples: dict[str, dict[int, Any]] = {role: {} for role in models}
    for role in models:
        for num_steps in evaluate.steps:
            texts = [mine.get((role, num_steps))]
            if main_rank not in roles[role].ranks:
                dist.broadcast_object_list(texts, src=roles[role].ranks[0])
            samples[role][num_steps] = None if texts[0] is None else texts[0].numpy()
    if dist.get_rank() != main_rank:
        return {}
    train_blocks, valid_blocks = (
        data.first_blocks(split, evaluate.max_tokens) for split in ("train", "valid")
    )
    evaluator = NgramEvaluator.fit(
        train_blocks, tokenizer.vocab_size, min(LARGEST_ORDER, train_blocks.shape[1]), eos_id=tokenizer.eos_id
    )
    quality = quality_table(samples, valid_blocks, evaluator)
    write_json(quality, run_dir / "quality.json")
    plot_quality(quality, run_dir / "quality.png")
    arrays: dict[str, Any] = {f"{role}_{n}": ids for role, by_n in samples.items() for n, ids in by_n.items()}
    np.savez_compressed(run_dir / "samples.npz", **arrays)
    console.print(render_table(quality))
    console.print(show_samples(samples, evaluate.shown_steps, tokenizer, evaluate.shown_samples))
    console.print(f"table, plot and samples written to {run_dir}")
    return quality
