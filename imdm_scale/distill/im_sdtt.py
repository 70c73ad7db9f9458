"""IM-SDTT: self-distillation through time of an infinite mask model, in rounds of doubling step size."""

from __future__ import annotations

import torch
from torch import Tensor

from imdm_scale.diffusion.divergence import divergence
from imdm_scale.diffusion.likelihood import forbid_mask
from imdm_scale.diffusion.targets import two_substeps
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.method import Distillation, Shows
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.rounds import HalvingRounds, Round
from imdm_scale.parallel.engine import Teacher


class ImSdtt(Distillation):
    """The student learns in one step what its teacher does in two (IMDM, arXiv 2605.10518; SDTT, 2410.21035).

    When a round ends the student becomes the teacher. Unlike the reference code, the loss is divided by the masked
    positions of the whole global batch, so that it does not depend on the number of ranks or micro-batches.

    Args:
        divergence_name: one of `diffusion.divergence.DIVERGENCES`.
        rounds: the teacher's steps.
        teacher_temperature: divides the teacher's logits. It acts in every round, so it compounds.
    """

    shows = Shows.DISTRIBUTION

    def __init__(self, divergence_name: str, rounds: HalvingRounds, teacher_temperature: float = 1.0) -> None:
        self.divergence_name = divergence_name
        self.rounds = rounds
        self.teacher_temperature = teacher_temperature

    def round_at(self, step: int) -> Round | None:
        """The round of an update, None when the schedule is over."""
        return self.rounds.at(step)

    def losses(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        target: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """The divergence from the teacher's two-step prediction."""
        assert target is not None
        return divergence(
            self.divergence_name,
            forbid_mask(logits_NV, mask_id, vocabulary),
            forbid_mask(target / self.teacher_temperature, mask_id, vocabulary),
            vocabulary,
        )

    def teacher_evaluations(self, step: int) -> int:
        """One in each sub-step."""
        return 2

    def teach(self, teacher: Teacher, batch: MicroBatch) -> Tensor | None:
        """Final hidden states of the sub-step that reveals a position, of the second one where neither does."""

        def noise_of(rows: slice) -> Tensor:
            return batch.mask_noise(teacher.architecture, teacher.device, rows)

        def draw(hidden_NH: Tensor | None, u_N: Tensor) -> Tensor:
            ids_N = None
            if hidden_NH is not None:
                ids_N = teacher.draw(teacher.logits(hidden_NH), u_N, self.teacher_temperature)
            return teacher.from_last_stage(ids_N, u_N.shape, torch.int64)

        return two_substeps(
            lambda x_BL, positions_N: teacher.hidden_states(x_BL, noise_of, positions_N),
            draw,
            batch.x_t_BL,
            batch.t_B,
            1 / self.rounds.teacher_steps(batch.step),
            mask_id=teacher.architecture.mask_token_id,
            seed=batch.seed,
            sample_ids_B=batch.sample_ids_B,
            step=batch.step,
        )
