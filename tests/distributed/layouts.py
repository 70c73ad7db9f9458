"""The ways to do the small run that must all be the same run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from imdm_scale.config.layout import RoleLayout, RunLayout, run_layout
from imdm_scale.config.tree import Config
from tests.distributed.small_run import small_config


@dataclass(frozen=True)
class Case:
    """What is computed, and how it is spread over ranks."""

    what: tuple[str, ...]
    """The method's name and `key=value` words that the result depends on."""
    how: tuple[str, ...]
    """`key=value` words that it must not depend on."""
    stage: int
    """The student's ZeRO stage."""
    world_size: int = 4

    @property
    def config(self) -> Config:
        """All settings."""
        return small_config(*self.what, *self.how)

    @property
    def layout(self) -> RunLayout:
        """Which rank is what."""
        return run_layout(self.config, self.world_size, self.stage)

    def __str__(self) -> str:
        layout, config = self.layout, self.config
        words = [describe(role, layout) for role in layout.roles]
        words += [f"dropout {config.model.dropout:g}"] * (config.model.dropout > 0)
        words += [f"recompute {config.train.recompute}"] * (config.train.recompute != "none")
        words += [config.method.name] * (config.method.name not in ("im_sdtt", "pretrain"))
        others = (
            "method.fresh_noise",
            "method.refresh_from",
            "method.reset_optimizer",
            "method.states",
            "method.target",
            "method.trajectory_grid",
            "model.qk_norm",
            "model.noise_fourier",
            "model.num_masks",
            "model.norm",
            "model.mlp",
            "model.bias",
            "model.rope_base",
            "teacher.prefetch",
            "teacher.checksum",
        )
        words += [word for word in (*self.what, *self.how) if word.startswith(others)]
        return ", ".join(words)


def describe(role: RoleLayout, layout: RunLayout) -> str:
    """`student tp 2 x pp 1 x dp 2 ZeRO-3`, with the ranks where the roles have ranks of their own."""
    virtual = f" x {role.virtual_stages} virtual" if role.virtual_stages > 1 else ""
    words = [role.role, f"tp {role.tp} x pp {role.pp}{virtual} x dp {role.dp}", f"ZeRO-{role.zero_stage}"]
    words += ["sequence-parallel"] * role.sequence_parallel
    if layout.placement == "disaggregated":
        words.append(f"on {'+'.join(map(str, role.ranks))}")
    return " ".join(words)


def split(role: str, tp: int, pp: int, sequence_parallel: bool, virtual_stages: int) -> tuple[str, ...]:
    """The words that split a network."""
    sizes = {
        "tp": tp,
        "pp": pp,
        "sequence_parallel": sequence_parallel,
        "virtual_stages": virtual_stages,
    }
    return tuple(f"parallel.{role}.{name}={size}" for name, size in sizes.items())


def student(
    tp: int = 1, pp: int = 1, sequence_parallel: bool = False, virtual_stages: int = 1
) -> tuple[str, ...]:
    """The words that split the student."""
    return split("student", tp, pp, sequence_parallel, virtual_stages)


def teacher(
    tp: int = 1, pp: int = 1, sequence_parallel: bool = False, virtual_stages: int = 1
) -> tuple[str, ...]:
    """The words that split the teacher."""
    return split("teacher", tp, pp, sequence_parallel, virtual_stages)


def micro_batches(student: int, teacher: int | None = None) -> tuple[str, ...]:
    """The words for the sizes of micro-batches."""
    words = (f"train.micro_batch_size={student}",)
    return words if teacher is None else (*words, f"teacher.micro_batch_size={teacher}")


def disaggregated(ranks: int | list[int]) -> tuple[str, ...]:
    """The words that give the teacher ranks of its own."""
    return ("teacher.placement=disaggregated", f"teacher.ranks={ranks}")


DISTIL = ("im_sdtt",)
SHORT = ("train.max_steps=4", "method.steps_per_round=3")
"""Four updates under two teachers, in the place of twenty under three."""
PRETRAIN = ("pretrain",)
DROPOUT = "model.dropout=0.1"
SPLITS = tuple(product((1, 2), (1, 2)))
"""Every (tp, pp) of sizes 1 and 2; on four ranks the data-parallel size is 4, 2, 2 and 1."""
STUDENTS_MICRO_BATCH = {(1, 1): 1, (1, 2): 1, (2, 1): 2, (2, 2): 2}
"""With several stages this makes four micro-batches, so that forward and backward passes alternate."""
TEACHERS_MICRO_BATCH = {(1, 1): 1, (1, 2): 2, (2, 1): 2, (2, 2): 4}

COMBINATIONS = [
    Case(
        DISTIL,
        student(*split)
        + teacher(*split)
        + micro_batches(STUDENTS_MICRO_BATCH[split], TEACHERS_MICRO_BATCH[split]),
        stage,
    )
    for split in SPLITS
    for stage in range(4)
]
"""Student and teacher alike."""

RECOMPUTE = {0: "none", 1: "selective", 2: "full", 3: "full"}
COMBINATIONS_WITH_DROPOUT = [
    Case(
        (*PRETRAIN, DROPOUT),
        (
            *student(tp, pp, sequence_parallel=tp > 1),
            *micro_batches(STUDENTS_MICRO_BATCH[tp, pp]),
            f"train.recompute={RECOMPUTE[stage]}",
        ),
        stage,
    )
    for tp, pp in SPLITS
    for stage in range(4)
]
"""With sequence parallelism where there are tensor-parallel ranks, and every kind of recomputation."""

SEQUENCE_PARALLEL = [
    Case(
        DISTIL + SHORT,
        (*student(2, pp, True), *teacher(2, pp, True), *micro_batches(2, 4), f"train.recompute={recompute}"),
        stage,
    )
    for pp, stage, recompute in [(2, 0, "full"), (2, 3, "selective")]
]

TEACHERS_OF_THEIR_OWN_LAYOUT = [
    Case(DISTIL + SHORT, (*how, *more.split()), stage)
    for how, more, stage in [
        (student() + teacher(2) + micro_batches(2, 4), "teacher.prefetch=0", 1),
        (student() + teacher(4) + micro_batches(2, 8), "", 3),
        (student(2) + teacher(1) + micro_batches(2, 1), "", 3),
        (student(2) + teacher(4) + micro_batches(4, 4), "teacher.zero_stage=3", 0),
        (student(2) + teacher(1, 2) + micro_batches(2, 2), "teacher.zero_stage=0", 3),
        (student(1, 2) + teacher(2) + micro_batches(1, 4), "teacher.prefetch=2", 3),
        (student(2, 2) + teacher(2) + micro_batches(2, 4), "teacher.zero_stage=0 teacher.prefetch=0", 3),
        (student(2, 2) + teacher() + micro_batches(2, 2), "teacher.zero_stage=3", 1),
        (
            student(1) + teacher(2, 2, True) + micro_batches(1, 4),
            "teacher.zero_stage=3 teacher.checksum=true",
            2,
        ),
    ]
]

DISAGGREGATED = [
    Case(
        (*DISTIL, *SHORT, "train.global_batch_size=12", *what),
        (*disaggregated(ranks), *how, *more.split()),
        stage,
    )
    for what, ranks, how, more, stage in [
        # One rank and three.
        ((), 3, student() + teacher() + micro_batches(3, 2), "", 3),
        ((), [0, 1, 3], student() + teacher() + micro_batches(4, 4), "teacher.zero_stage=3", 0),
        # Two and two.
        ((), 2, student(2) + teacher(1, 2) + micro_batches(3, 6), "", 3),
        ((), [0, 2], student(1, 2) + teacher(2) + micro_batches(3, 4), "teacher.checksum=true", 3),
        ((), 2, student() + teacher() + micro_batches(3, 2), "teacher.prefetch=2 teacher.zero_stage=3", 2),
        (
            (DROPOUT,),
            2,
            student(2, 1, True) + teacher(2, 1, True) + micro_batches(6, 12),
            "train.recompute=full",
            3,
        ),
        # Three and one.
        ((), [0], student() + teacher() + micro_batches(2, 3), "teacher.prefetch=2", 1),
        ((), 1, student() + teacher() + micro_batches(4, 12), "teacher.zero_stage=0", 3),
    ]
]

LLAMA = (
    "model.norm=rmsnorm",
    "model.mlp=swiglu",
    "model.mlp_size=56",
    "model.bias=false",
    "model.rope_base=500",
)
RESET = (*DISTIL, "train.max_steps=4", "method.steps_per_round=2", "method.reset_optimizer=true")
VARIANTS = [
    Case((*DISTIL, *SHORT, "method.refresh_from=ema"), student(1, 2) + teacher(2) + micro_batches(2, 4), 3),
    Case((*DISTIL, *SHORT, "method.refresh_from=ema"), student(2) + teacher(2) + micro_batches(4), 0),
    Case(
        (*DISTIL, *SHORT, "model.noise_fourier=3"), student(2, 2, True) + teacher(2) + micro_batches(4, 4), 3
    ),
    Case((*DISTIL, *SHORT, "model.num_masks=5"), student(2, 2, True) + teacher(2) + micro_batches(4, 4), 3),
    Case((*DISTIL, *SHORT, "model.qk_norm=true"), student(2, 2) + teacher(2) + micro_batches(4, 4), 1),
    Case((*DISTIL, *SHORT, *LLAMA), student(2, 2, True) + teacher(2) + micro_batches(4, 4), 3),
    Case((*DISTIL, *SHORT, *LLAMA), student(2, 1) + teacher(1, 2) + micro_batches(2, 2), 1),
    Case(
        (*PRETRAIN, *SHORT, *LLAMA, "model.num_layers=4", DROPOUT),
        (*student(2, 2, True, 2), *micro_batches(2), "train.recompute=full"),
        3,
    ),
    Case(RESET, student(1, 2) + teacher(2) + micro_batches(2, 4), 3),
    Case(RESET, student(2) + teacher() + micro_batches(2, 2), 1),
    Case(RESET, student() + teacher() + micro_batches(2, 2), 0),
    Case(
        (*DISTIL, *SHORT, "model.qk_norm=true"), student(2, 1, True) + teacher(2, 2) + micro_batches(4, 4), 3
    ),
]
"""Other things to compute."""

COUPLED = ("coupled", "method.trajectory_steps=3")
STUDENT, TEACHER, MIX = (
    ("method.visit_steps=2", f"method.states={states}") for states in ("student", "teacher", "mix")
)
METHODS = [
    Case((*what, *SHORT), (*how, *more.split()), stage)
    for what, how, more, stage in [
        (COUPLED, student() + teacher() + micro_batches(2, 1), "", 3),
        (COUPLED, student(2, 2) + teacher(2) + micro_batches(2, 4), "", 1),
        ((*COUPLED, "method.trajectory_grid=order"), student(2) + teacher(2) + micro_batches(2, 4), "", 3),
        (
            (*COUPLED, "method.trajectory_grid=position"),
            student(1, 2) + teacher() + micro_batches(2, 2),
            "",
            2,
        ),
        (
            ("coupled", "method.target=progressive", "method.student_draws=argmax"),
            student(2) + teacher(1, 2) + micro_batches(2, 2),
            "teacher.zero_stage=3",
            0,
        ),
        (
            (*COUPLED, "method.target=mixture", *STUDENT),
            student(1, 2) + teacher(2) + micro_batches(2, 4) + disaggregated(2),
            "",
            3,
        ),
        ((*COUPLED, *TEACHER), student() + teacher(2) + micro_batches(2, 4) + disaggregated(2), "", 2),
        ((*COUPLED, *MIX), student(2) + teacher(2) + micro_batches(2, 4), "", 3),
        ((*DISTIL, *STUDENT), student(1, 2) + teacher(2) + micro_batches(2, 4), "", 3),
        ((*DISTIL, *TEACHER), student(2) + teacher() + micro_batches(4, 2), "", 1),
        (("im_redi",), student(2, 2) + micro_batches(2), "", 3),
        (("im_redi", "method.fresh_noise=true"), student(1, 2) + micro_batches(2), "", 1),
        (("im_redi", "model.num_masks=5"), student(2) + micro_batches(4), "", 0),
        ((*DISTIL, *MIX), student() + teacher() + micro_batches(2, 2) + disaggregated([0, 2]), "", 0),
    ]
]
"""Other targets, and other states than those of the data."""

INTERLEAVED = [
    Case((*DISTIL, *SHORT, "model.num_layers=4", *what), how, stage)
    for what, how, stage in [
        ((), student(1, 2, False, 2) + teacher(1, 2, False, 2) + micro_batches(1, 2), 0),
        ((), student(1, 2, False, 2) + teacher(2) + micro_batches(1, 4), 1),
        ((DROPOUT,), student(2, 2, True, 2) + teacher(2, 2) + micro_batches(2, 4), 2),
        ((), student(1, 2, False, 2) + teacher(1, 2) + micro_batches(1, 2), 3),
        ((DROPOUT,), student(2, 2, False, 2) + teacher(2, 2, True, 2) + micro_batches(2, 4), 3),
        ((), student(1, 2, False, 2) + teacher(1, 2, False, 2) + micro_batches(1, 2) + disaggregated(2), 3),
    ]
]
"""Stages that are dealt to the ranks in turn."""

CASES = [
    *COMBINATIONS,
    *COMBINATIONS_WITH_DROPOUT,
    *SEQUENCE_PARALLEL,
    *TEACHERS_OF_THEIR_OWN_LAYOUT,
    *DISAGGREGATED,
    *VARIANTS,
    *METHODS,
    *INTERLEAVED,
]
