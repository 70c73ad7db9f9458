"""The course of the learning rate."""

from __future__ import annotations

import math

from imdm_scale.config.tree import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then constant, cosine or linear decay."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.learning_rate
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    left = 1 - done if train.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return train.learning_rate * (train.min_lr_ratio + (1 - train.min_lr_ratio) * left)
