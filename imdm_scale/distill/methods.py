"""The methods by name."""

from __future__ import annotations

from imdm_scale.config.tree import MethodConfig
from imdm_scale.diffusion.vocabulary_order import TokenOrder
from imdm_scale.distill.coupled import Coupled, CoupledTeacher
from imdm_scale.distill.im_redi import ImRedi
from imdm_scale.distill.im_sdtt import ImSdtt
from imdm_scale.distill.method import Method
from imdm_scale.distill.pretrain import Pretrain
from imdm_scale.distill.rounds import HalvingRounds


def method_of(settings: MethodConfig, order: TokenOrder | None = None) -> Method:
    """The method that is configured.

    Args:
        order: in which tokens are drawn by coupled uniforms; None is the order of ids.
    """
    if settings.name == "pretrain":
        return Pretrain()
    if settings.name == "im_redi":
        return ImRedi()
    rounds = HalvingRounds(settings.initial_steps, settings.steps_per_round, settings.min_steps)
    if settings.name == "coupled":
        share = {"trajectory": 1.0, "progressive": 0.0, "mixture": settings.trajectory_share}[settings.target]
        return Coupled(
            CoupledTeacher(
                settings.trajectory_steps,
                share,
                rounds if share < 1 else None,
                settings.teacher_temperature,
                settings.trajectory_grid,
            ),
            greedy_student=settings.student_draws == "argmax",
            rank_V=None if order is None else order.rank_V,
        )
    return ImSdtt(settings.divergence, rounds, settings.teacher_temperature)
