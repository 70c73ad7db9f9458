"""What exported models of a synthetic task write in few steps, beside each other.

    python benchmarks/synthetic_study.py --task 'synthetic://all_equal?vocab_size=32' --length 8 \
        teacher=runs/synthetic_teacher/student coupled=runs/synthetic_coupled/student

Each model is sampled as it was trained to be, and every measure has its 95% interval over the samples. Where a run's
metrics.jsonl lies beside the model, its updates, network evaluations and last use of the noise are shown as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from imdm_scale.data.synthetic import SyntheticTask
from imdm_scale.data.synthetic_source import synthetic_source
from imdm_scale.evaluate.synthetic import possible_share, token_entropy
from imdm_scale.hf.export import load_folder


def training_of(folder: Path) -> str:
    """Updates, network evaluations and I(token; e) of the run that made a model."""
    file = folder.parent / "metrics.jsonl"
    if not file.exists():
        return " | | "
    updates = [json.loads(line) for line in file.read_text().splitlines()]
    measured = [
        update["diagnostics"].get("noise_information") for update in updates if "diagnostics" in update
    ]
    information = f"{measured[-1]:.3f}" if measured and measured[-1] is not None else ""
    return f"{updates[-1]['step']:,} | {updates[-1]['network_evaluations']:,} | {information}"


def row(folder: Path, task: SyntheticTask, arguments: argparse.Namespace, sampler: str | None) -> str:
    """The cells of one model."""
    model = load_folder(folder).float()
    cells = []
    for num_steps in arguments.steps:
        ids_SL = model.generate_text(
            arguments.num_samples, num_steps, arguments.seed, sampler=sampler
        ).numpy()
        share = possible_share(ids_SL, task)
        part = token_entropy(ids_SL, task.vocab_size) / np.log(task.vocab_size)
        cells.append(f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}] / {part:.3f}")
    return " | ".join(cells)


def main() -> None:
    """Samples and prints a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", metavar="NAME=FOLDER", help="exported models; NAME=FOLDER:SAMPLER too"
    )
    parser.add_argument("--task", required=True, help="as in data.path")
    parser.add_argument("--length", type=int, required=True, help="ids in a sequence")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="(default: 1 2 4 8 16)"
    )
    parser.add_argument("--num-samples", type=int, default=10_000, help="for each cell (default: 10,000)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = synthetic_source(arguments.task, arguments.length).task
    print("share of possible samples [95% interval] / token entropy as a share of the maximum\n")
    steps = " | ".join(f"{n} step{'s' * (n > 1)}" for n in arguments.steps)
    print(f"| model | updates | network evaluations | I(token; e) | {steps} |")
    print("|---" * (4 + len(arguments.steps)) + "|")
    for word in arguments.models:
        name, _, where = word.partition("=")
        folder, _, sampler = where.partition(":")
        cells = row(Path(folder), task, arguments, sampler or None)
        print(f"| {name} | {training_of(Path(folder))} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
