"""Checks of a whole configuration that need no GPU and no other process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from imdm_scale.config.architecture import SIZES, Architecture, size_named
from imdm_scale.config.nearest import near_files
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError

EMBEDDED_TEACHER_SIZE = "tiny"
"""Size of the teacher that ships with the package."""


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


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above_low=True)
BELOW_ONE = Range(0, 1)

RANGES: dict[str, Range] = {
    "seed": NOT_NEGATIVE,
    "method.initial_steps": Range(2),
    "method.steps_per_round": COUNT,
    "method.min_steps": COUNT,
    "method.teacher_temperature": POSITIVE,
    "method.sampling_eps": Range(0, 1, above_low=True),
    "model.length": COUNT,
    "model.dropout": BELOW_ONE,
    "model.noise_dim": NOT_NEGATIVE,
    "model.noise_scale": POSITIVE,
    "model.attention_softcap": NOT_NEGATIVE,
    "model.hidden_size": COUNT,
    "model.num_layers": COUNT,
    "model.num_heads": COUNT,
    "parallel.student.tp": COUNT,
    "parallel.student.pp": COUNT,
    "parallel.teacher.tp": COUNT,
    "parallel.teacher.pp": COUNT,
    "train.max_steps": COUNT,
    "train.micro_batch_size": COUNT,
    "train.global_batch_size": COUNT,
    "train.save_every": COUNT,
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
    "evaluate.num_samples": COUNT,
    "evaluate.batch_size": COUNT,
    "evaluate.shown_samples": NOT_NEGATIVE,
    "evaluate.shown_steps": COUNT,
    "evaluate.temperature": POSITIVE,
    "evaluate.seed": NOT_NEGATIVE,
}
"""Allowed values of every number in the tree."""


def check_config(config: Config, world_size: int) -> None:
    """Refuses a configuration that cannot run on `world_size` processes.

    Raises:
        UserError: the first setting found that does not fit, with what would.
    """
    _check_ranges(config)
    _check_network(config)
    _check_method(config)
    _check_layout(config, world_size)
    _check_batches(config, world_size)
    _check_evaluation(config)
    _check_paths(config)


def architecture_of(config: Config, vocab_size: int, mask_token_id: int) -> Architecture:
    """The network that `config.model` describes, over a vocabulary of `vocab_size` ids.

    Raises:
        UserError: no size has the name `model.size`.
    """
    model = config.model
    shape = size_named(model.size)
    for name in shape:
        given = getattr(model, name)
        if given is not None:
            shape[name] = given
    return Architecture(
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        length=model.length,
        noise_kind=model.noise_kind,
        noise_scale=model.noise_scale,
        dropout=model.dropout,
        qk_norm=model.qk_norm,
        attention_softcap=model.attention_softcap,
        **shape,
    )


def _check_ranges(config: Config) -> None:
    for key, allowed in RANGES.items():
        value = attrgetter(key)(config)
        if value is not None and not allowed.holds(value):
            raise UserError(f"{key} is {value}, but must be {allowed}.")


def _check_method(config: Config) -> None:
    method = config.method
    if config.teacher.placement == "disaggregated":
        raise UserError(
            "teacher.placement is disaggregated, but this version runs teacher and student on the same "
            "ranks; set teacher.placement=colocated."
        )
    if method.name == "pretrain":
        if config.teacher.path is not None:
            raise UserError(
                f"teacher.path is {config.teacher.path}, but method.name is pretrain, which has no teacher; "
                "leave teacher.path null (train.init_from starts from given weights)."
            )
        return
    if config.train.init_from is not None:
        raise UserError(
            f"train.init_from is {config.train.init_from}, but with method.name {method.name} the student "
            "starts as a copy of the teacher; name the weights in teacher.path."
        )
    if method.min_steps > method.initial_steps:
        raise UserError(
            f"method.min_steps is {method.min_steps}, more than method.initial_steps, which is "
            f"{method.initial_steps}, so that no round could begin; set it to {method.initial_steps} or less."
        )
    if config.teacher.path is None:
        shape = architecture_of(config, vocab_size=1, mask_token_id=0)
        given = {name: getattr(shape, name) for name in ("hidden_size", "num_layers", "num_heads")}
        embedded = {name: SIZES[EMBEDDED_TEACHER_SIZE][name] for name in given}
        if given != embedded:
            raise UserError(
                f"model.size is {config.model.size} ({_listed(given)}), but teacher.path is null and "
                f"the packaged teacher has size {EMBEDDED_TEACHER_SIZE} ({_listed(embedded)}); set "
                f"model.size={EMBEDDED_TEACHER_SIZE}, or teacher.path to a teacher of the student's shape."
            )


def _check_network(config: Config) -> None:
    shape = architecture_of(config, vocab_size=1, mask_token_id=0)
    hidden, heads = shape.hidden_size, shape.num_heads
    if hidden % heads or shape.head_dim % 2:
        fitting = [n for n in _divisors(hidden) if hidden // n % 2 == 0]
        remedy = (
            f"set model.num_heads to {_nearest(fitting, heads)}"
            if fitting
            else "choose an even model.hidden_size"
        )
        raise UserError(
            f"model.hidden_size {hidden} over model.num_heads {heads} gives heads of width "
            f"{hidden / heads:g}, but the rotary embedding needs an even whole number; {remedy}."
        )
    for role in ("student", "teacher"):
        layout = getattr(config.parallel, role)
        if layout.pp != 1:
            raise UserError(
                f"parallel.{role}.pp is {layout.pp}, but this version keeps all layers of a network on one "
                f"pipeline stage; set parallel.{role}.pp=1 (parallel.{role}.tp and ZeRO split it otherwise)."
            )
        if heads % layout.tp:
            raise UserError(
                f"parallel.{role}.tp is {layout.tp}, which does not divide the {heads} attention heads; set "
                f"it to {_nearest(_divisors(heads), layout.tp)}."
            )


def _check_layout(config: Config, world_size: int) -> None:
    for role in ("student", "teacher"):
        layout = getattr(config.parallel, role)
        ranks = layout.tp * layout.pp
        if world_size % ranks:
            worlds = sorted({max(world_size // ranks, 1) * ranks, (world_size // ranks + 1) * ranks})
            heads = architecture_of(config, vocab_size=1, mask_token_id=0).num_heads
            fitting = _nearest([n for n in _divisors(world_size) if heads % n == 0], layout.tp)
            raise UserError(
                f"parallel.{role}.tp x parallel.{role}.pp is {layout.tp} x {layout.pp} = {ranks}, which does "
                f"not divide the {world_size} processes; start {_either(worlds)} processes, or set "
                f"parallel.{role}.tp to {fitting}."
            )
    parallel = config.parallel
    if config.method.name != "pretrain" and parallel.student.tp != parallel.teacher.tp:
        raise UserError(
            f"parallel.teacher.tp is {parallel.teacher.tp} and parallel.student.tp is {parallel.student.tp}, but "
            "in this version both networks share one layout; set both to the same number."
        )


def _check_batches(config: Config, world_size: int) -> None:
    micro, whole = config.train.micro_batch_size, config.train.global_batch_size
    data_parallel = world_size // (config.parallel.student.tp * config.parallel.student.pp)
    unit = micro * data_parallel
    if whole % unit:
        fitting = sorted({max(whole // unit, 1) * unit, (whole // unit + 1) * unit})
        raise UserError(
            f"train.global_batch_size is {whole}, which is no multiple of train.micro_batch_size {micro} x "
            f"data-parallel size {data_parallel} = {unit}; set it to {_either(fitting)}, or change "
            "train.micro_batch_size."
        )


def _check_evaluation(config: Config) -> None:
    evaluate = config.evaluate
    if not evaluate.steps or min(evaluate.steps) < 1 or len(set(evaluate.steps)) < len(evaluate.steps):
        raise UserError(
            f"evaluate.steps is {evaluate.steps}, but must be a list of different positive numbers, such as "
            "[1,4,16]."
        )
    if evaluate.shown_samples > evaluate.num_samples:
        raise UserError(
            f"evaluate.shown_samples is {evaluate.shown_samples}, more than evaluate.num_samples, "
            f"{evaluate.num_samples}; set it to {evaluate.num_samples} or less."
        )


def _check_paths(config: Config) -> None:
    for key in ("data.path", "tokenizer.path", "teacher.path", "train.init_from"):
        given = attrgetter(key)(config)
        if given is None:
            continue
        path = Path(given)
        if not path.exists():
            raise UserError(f"{key} is {given}, which does not exist; {near_files(path)}")
        if key in ("teacher.path", "train.init_from"):
            missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
            if missing:
                raise UserError(
                    f"{key} is {given}, which holds no {' and no '.join(missing)}; name a folder that "
                    "holds a model's config.json and model.safetensors."
                )
    if Path(config.run_dir).exists() and not Path(config.run_dir).is_dir():
        raise UserError(
            f"run_dir is {config.run_dir}, which is a file; name a folder, which is made if need be."
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(fitting: list[int], wanted: int) -> str:
    """The largest fitting number below `wanted` and the smallest above it."""
    below, above = [n for n in fitting if n < wanted], [n for n in fitting if n > wanted]
    return _either(below[-1:] + above[:1])


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _listed(shape: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
