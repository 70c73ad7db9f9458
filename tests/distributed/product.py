"""Runs of the whole program at a size of seconds: a tiny teacher's folder, a synthetic task, real checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from imdm_scale.config.check import check_config
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.tree import Config
from imdm_scale.data.synthetic_source import id_tokenizer, synthetic_source
from imdm_scale.hf.export import config_from_architecture, save_folder
from imdm_scale.parallel.process import world_size
from tests.distributed.small_run import small_config, zero
from tests.tiny import plain_network, tiny, weights_of

TASK = f"synthetic://all_equal?vocab_size={tiny().vocab_size - 2}&train=64&valid=8"
"""Two more ids are those of the mask and of the boundary."""
WORDS = (
    f"data.path={TASK}",
    "data.on_damage=stop",
    "evaluate.at_end=false",
    f"model.noise_dim={tiny().noise_dim}",
    "method.initial_steps=64",
    "log.wandb=off",
    "train.save_every=9",
    "train.keep_last=1",
    "train.keep_every=9",
    "train.max_steps=29",
    "method.steps_per_round=7",
)


@dataclass(frozen=True)
class Run:
    """A run of the product: what is computed, and how it is spread over ranks."""

    words: tuple[str, ...]
    stage: int
    world_size: int
    method: str = "im_sdtt"

    def config(self, folder: Path, *words: str) -> Config:
        """Its settings. The teacher lies in `folder`/teacher, what it writes in `folder`/run."""
        start = "train.init_from" if self.method == "pretrain" else "teacher.path"
        return small_config(
            self.method,
            *WORDS,
            f"{start}={folder / 'teacher'}",
            f"run_dir={folder / 'run'}",
            *self.words,
            *words,
        )

    def __str__(self) -> str:
        return " ".join([self.method, f"ZeRO-{self.stage}", f"{self.world_size} ranks", *self.words])


def write_teacher(folder: Path) -> None:
    """A folder that `teacher.path` can name."""
    architecture = tiny()
    config = config_from_architecture(
        architecture,
        tokenizer_fingerprint=id_tokenizer(
            synthetic_source(TASK, architecture.length).task.vocab_size
        ).fingerprint,
    )
    save_folder(weights_of(plain_network(architecture)), config, folder / "teacher")


def train_product(config: Config, stage: int) -> None:
    """The training program on this rank, from its checked configuration on."""
    from imdm_scale.distill.run import run

    check_config(config, world_size())
    ds_config: dict[str, Any] = resolve_ds_config(zero(stage), config, world_size(), Path("zero.json"))
    run(config, ds_config, torch.device("cpu"), ["tools/train.py"])


def losses_of(folder: Path) -> dict[int, float]:
    """Update -> loss, as the run in `folder`/run wrote them."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def student_of(folder: Path) -> dict[str, np.ndarray]:
    """The averaged weights at the end of the run in `folder`/run."""
    tensors = load_file(folder / "run" / "student" / "model.safetensors")
    return {name: tensor.numpy() for name, tensor in tensors.items()}
