"""The table at the end of a run: what each network writes in few steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console

from imdm_scale.config.tree import EvaluateConfig
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.sampling import sample_texts
from imdm_scale.evaluate.ngram import NgramEvaluator
from imdm_scale.evaluate.quality import plot_quality, quality_table, render_table, show_samples, write_json
from imdm_scale.parallel.engine import ModelEngine


def report_quality(
    models: Mapping[str, ModelEngine],
    evaluate: EvaluateConfig,
    train_blocks: np.ndarray,
    valid_blocks: np.ndarray,
    tokenizer: Tokenizer,
    run_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Sample from every model at every number of steps; rank 0 scores, prints, writes and plots.

    Collective. Writes quality.json, quality.png and samples.npz to `run_dir`.

    Returns:
        The table on rank 0, an empty dictionary elsewhere.
    """
    samples: dict[str, dict[int, np.ndarray]] = {}
    for role, model in models.items():
        samples[role] = {}
        for num_steps in evaluate.steps:
            with console.status(f"sampling: {role}, {num_steps} steps"):
                samples[role][num_steps] = sample_texts(
                    model,
                    SamplerSettings(num_steps=num_steps, temperature=evaluate.temperature),
                    evaluate.num_samples,
                    evaluate.batch_size,
                    evaluate.seed,
                    tokenizer.bos_id,
                ).numpy()
    if dist.get_rank() != 0:
        return {}
    evaluator = NgramEvaluator.fit(train_blocks, tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    quality = quality_table(samples, valid_blocks, evaluator)
    write_json(quality, run_dir / "quality.json")
    plot_quality(quality, run_dir / "quality.png")
    texts: dict[str, Any] = {f"{role}_{n}": ids for role, by_n in samples.items() for n, ids in by_n.items()}
    np.savez_compressed(run_dir / "samples.npz", **texts)
    console.print(render_table(quality))
    console.print(show_samples(samples, evaluate.shown_steps, tokenizer, evaluate.shown_samples))
    console.print(f"table, plot and samples written to {run_dir}")
    return quality
