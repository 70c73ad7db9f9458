"""Allowed values of every number in the tree of settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter

from imdm_scale.config.nearest import either
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError


@dataclass(frozen=True)
class Range:
    """Allowed values of a number."""

    low: float
    high: float = math.inf
    above_low: bool = False
    """Whether `low` itself is excluded."""
    below_high: bool = True
    """Whether `high` itself is excluded."""

    def holds(self, value: float) -> bool:
        """Whether `value` lies within; never true of NaN."""
        over = value > self.low if self.above_low else value >= self.low
        return over and (value < self.high if self.below_high else value <= self.high)

    def __str__(self) -> str:
        words = f"{'above' if self.above_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'below' if self.below_high else 'at most'} {self.high:g}"
        return words


@dataclass(frozen=True)
class OneOf:
    """Allowed values of a number, listed."""

    values: tuple[int, ...]

    def holds(self, value: float) -> bool:
        """Whether `value` is listed."""
        return value in self.values

    def __str__(self) -> str:
        return either(self.values)


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above_low=True)
BELOW_ONE = Range(0, 1)

RANGES: dict[str, Range | OneOf] = {
    "seed": NOT_NEGATIVE,
    "method.initial_steps": Range(2),
    "method.steps_per_round": COUNT,
    "method.min_steps": COUNT,
    "method.teacher_temperature": POSITIVE,
    "method.sampling_eps": Range(0, 1, above_low=True),
    "method.trajectory_steps": COUNT,
    "method.trajectory_share": Range(0, 1, above_low=True),
    "method.visit_steps": COUNT,
    "method.visit_share": Range(0, 1, above_low=True, below_high=False),
    "model.length": COUNT,
    "model.dropout": BELOW_ONE,
    "model.noise_dim": NOT_NEGATIVE,
    "model.noise_scale": POSITIVE,
    "model.noise_fourier": NOT_NEGATIVE,
    "model.num_masks": NOT_NEGATIVE,
    "model.attention_softcap": NOT_NEGATIVE,
    "model.rope_base": Range(1, above_low=True),
    "model.norm_eps": POSITIVE,
    "model.mlp_size": COUNT,
    "model.hidden_size": COUNT,
    "model.num_layers": COUNT,
    "model.num_heads": COUNT,
    "data.weights": POSITIVE,
    "data.workers": NOT_NEGATIVE,
    "data.cache_gib": POSITIVE,
    "data.attempts": COUNT,
    "data.timeout": POSITIVE,
    "parallel.student.tp": COUNT,
    "parallel.student.pp": COUNT,
    "parallel.student.virtual_stages": COUNT,
    "parallel.teacher.tp": COUNT,
    "parallel.teacher.pp": COUNT,
    "parallel.teacher.virtual_stages": COUNT,
    "teacher.zero_stage": OneOf((0, 3)),
    "teacher.micro_batch_size": COUNT,
    "teacher.prefetch": NOT_NEGATIVE,
    "teacher.timeout": POSITIVE,
    "train.max_steps": COUNT,
    "train.micro_batch_size": COUNT,
    "train.global_batch_size": COUNT,
    "train.save_every": COUNT,
    "train.keep_last": COUNT,
    "train.keep_every": NOT_NEGATIVE,
    "train.learning_rate": POSITIVE,
    "train.warmup_steps": NOT_NEGATIVE,
    "train.min_lr_ratio": Range(0, 1, below_high=False),
    "train.beta1": BELOW_ONE,
    "train.beta2": BELOW_ONE,
    "train.adam_eps": POSITIVE,
    "train.weight_decay": NOT_NEGATIVE,
    "train.gradient_clipping": NOT_NEGATIVE,
    "train.ema_decay": BELOW_ONE,
    "log.every": COUNT,
    "log.diagnose_every": NOT_NEGATIVE,
    "log.noise_draws": Range(2),
    "evaluate.num_samples": COUNT,
    "evaluate.batch_size": COUNT,
    "evaluate.shown_samples": NOT_NEGATIVE,
    "evaluate.shown_steps": COUNT,
    "evaluate.temperature": POSITIVE,
    "evaluate.max_tokens": COUNT,
    "evaluate.seed": NOT_NEGATIVE,
}
"""Allowed values of every number in the tree, and of each in a list; null, where it may be null, is allowed too."""


def check_ranges(config: Config) -> None:
    """Refuses a number that is out of its range.

    Raises:
        UserError: with the setting, its value and what is allowed.
    """
    for key, allowed in RANGES.items():
        value = attrgetter(key)(config)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not allowed.holds(number):
                raise UserError(f"{key} is {value}, but must be {allowed}.")
