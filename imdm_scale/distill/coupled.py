"""Noise-coupled distillation: the mask's noise carries all randomness of the sampler, so that a token is a
function of it.

Each masked position's e holds two uniforms: which token (u, by inverse CDF) and when it is revealed (tau); see
`diffusion/coupling.py`. The coupled sampler of a teacher has the law of its ancestral sampler, yet its text is a
function of e. A student that is trained by cross-entropy on the very tokens that the teacher reaches from (x_t, e)
has nothing random left to explain: no factorisation error remains that could not be learned away, even in one
step.

Shapes: B batch, L positions, N masked positions, V one shard of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.coupling import progressive_labels, trajectory_labels
from imdm_scale.diffusion.likelihood import cross_entropy, forbid_mask
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.method import Distillation, Shows
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.rounds import HalvingRounds, Round
from imdm_scale.parallel.engine import ModelEngine, Teacher


@dataclass(frozen=True)
class CoupledTeacher:
    """How the teacher goes from (x_t, e) to the tokens that the student learns."""

    trajectory_steps: int
    """Steps of its coupled trajectory from x_t to text."""
    trajectory_share: float
    """Share of the samples that are labelled by a trajectory: 1 all, 0 none. The others are labelled by two small
    steps, as in SDTT, the student becoming the teacher from round to round."""
    rounds: HalvingRounds | None
    """Of the two small steps; None where all samples are labelled by trajectories, whose teacher never changes."""
    temperature: float = 1.0
    """Divides the teacher's logits."""
    grid: str = "time"
    """Of the trajectory, one of `diffusion.coupling.GRIDS`."""


class Coupled(Distillation):
    """Cross-entropy on the coupled token, mean over the masked positions of the global batch.

    Args:
        teacher: how the labels arise.
        greedy_student: whether the student writes its likeliest tokens instead of drawing them by the noise's u: what
            is random in its text is then in the noise alone.
        rank_V: int64 places of the tokens in the order in which they are drawn; None is the order of ids.
    """

    shows = Shows.TOKEN

    def __init__(
        self, teacher: CoupledTeacher, greedy_student: bool = False, rank_V: Tensor | None = None
    ) -> None:
        self.teacher, self.greedy_student, self.rank_V = teacher, greedy_student, rank_V

    def round_at(self, step: int) -> Round | None:
        """The round of an update, None when the schedule is over; without rounds there is one that never ends."""
        if self.teacher.rounds is None:
            return Round(index=0, starts=step == 0, teacher_steps=float(self.teacher.trajectory_steps))
        return self.teacher.rounds.at(step)

    def losses(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        target: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """Cross-entropy on the teacher's tokens."""
        assert target is not None
        return cross_entropy(forbid_mask(logits_NV, mask_id, vocabulary), target, vocabulary)

    def teacher_evaluations(self, step: int) -> int:
        """Those of the trajectory, and two for the small steps."""
        share = self.teacher.trajectory_share
        return (self.teacher.trajectory_steps if share > 0 else 0) + (2 if share < 1 else 0)

    def teach(self, teacher: Teacher, batch: MicroBatch) -> Tensor | None:
        """The tokens that the teacher reaches from the batch's states with their own noise."""
        mask_id, share = teacher.architecture.mask_token_id, self.teacher.trajectory_share
        noise = batch.coordinates(teacher.architecture)

        def tokens(x_BL: Tensor, positions_N: Tensor, u_N: Tensor) -> Tensor:
            return self.tokens(teacher, batch, x_BL, positions_N, u_N)

        labels = []
        if share > 0:
            steps = self.teacher.trajectory_steps
            labels.append(
                trajectory_labels(
                    tokens, batch.x_t_BL, noise, batch.t_B, steps, mask_id=mask_id, grid=self.teacher.grid
                )
            )
        if share < 1:
            assert self.teacher.rounds is not None, "small steps have a size"
            dt = 1 / self.teacher.rounds.teacher_steps(batch.step)
            labels.append(progressive_labels(tokens, batch.x_t_BL, noise, batch.t_B, dt, mask_id=mask_id))
        labels_N = labels[0]
        if len(labels) == 2:
            u_B = uniform(batch.seed, batch.sample_ids_B, Purpose.TRAJECTORY, batch.step, 1)[:, 0, 0]
            chosen_N = (u_B < share)[batch.positions_N // batch.x_t_BL.shape[1]]
            labels_N = labels[0].where(chosen_N.to(labels_N.device), labels[1])
        return labels_N[:, None] if teacher.groups.is_last_stage else None

    def drawing(self, network: ModelEngine, step: int) -> dict[str, Any]:
        """See `Distillation.drawing`. The first teacher draws; one that was a student writes as it learned to.

        What it is not sure of, drawn at every position alone, would be errors that the next student learns and adds to.
        """
        how: dict[str, Any] = {"rank_V": self.rank_V}
        if isinstance(network, Teacher):
            round_ = self.round_at(step)
            assert round_ is not None, "an update belongs to a round"
            how["temperature"] = self.teacher.temperature
            if round_.index == 0:
                return how
        return {**how, "greedy": self.greedy_student}

    def visiting_uniforms(self, batch: MicroBatch, architecture: Architecture) -> Tensor:
        """The noise's own, as in the coupled sampler."""
        return batch.coordinates(architecture).u
