"""IM-SDTT: self-distillation through time of an infinite mask model, in rounds of doubling step size."""

from __future__ import annotations

import torch
from torch import Tensor

from imdm_scale.diffusion.divergence import divergence
from imdm_scale.diffusion.likelihood import forbid_mask
from imdm_scale.diffusion.targets import two_substeps
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.method import Distillation, Round
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.parallel.engine import Teacher


class ImSdtt(Distillation):
    """The student learns in one step what its teacher does in two (IMDM, arXiv 2605.10518; SDTT, 2410.21035).

    In round r the teacher takes steps of dt = 2^r / initial_steps; when a round ends the student becomes the
    teacher. Unlike the reference code, the loss is divided by the masked positions of the whole global
    batch, so that it does not depend on the number of ranks or micro-batches.

    Args:
        divergence_name: one of `diffusion.divergence.DIVERGENCES`.
        initial_steps: sampling steps of the first round's teacher.
        steps_per_round: updates in a round.
        min_steps: a round whose teacher would take fewer steps is not begun.
        teacher_temperature: divides the teacher's logits. It acts in every round, so it compounds.
    """

    def __init__(
        self,
        divergence_name: str,
        initial_steps: int,
        steps_per_round: int,
        min_steps: int,
        teacher_temperature: float = 1.0,
    ) -> None:
        self.divergence_name = divergence_name
        self.initial_steps = initial_steps
        self.steps_per_round = steps_per_round
        self.min_steps = min_steps
        self.teacher_temperature = teacher_temperature

    def teacher_steps(self, step: int) -> float:
        """Sampling steps of the teacher at an update; its step size is one over this."""
        return self.initial_steps / 2 ** (step // self.steps_per_round)

    def round_at(self, step: int) -> Round | None:
        """The round of an update, None when the schedule is over."""
        teacher_steps = self.teacher_steps(step)
        if round(teacher_steps) < self.min_steps:
            return None
        return Round(
            index=step // self.steps_per_round,
            starts=step % self.steps_per_round == 0,
            teacher_steps=teacher_steps,
        )

    def normaliser(self, micro_batch: MicroBatch) -> int:
        """The masked positions."""
        return micro_batch.positions_N.numel()

    def loss(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        teacher_logits_NV: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """Sum over masked positions of the divergence from the teacher's two-step prediction."""
        assert teacher_logits_NV is not None
        return divergence(
            self.divergence_name,
            forbid_mask(logits_NV, mask_id, vocabulary),
            forbid_mask(teacher_logits_NV / self.teacher_temperature, mask_id, vocabulary),
            vocabulary,
        ).sum()

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
            1 / self.teacher_steps(batch.step),
            mask_id=teacher.architecture.mask_token_id,
            seed=batch.seed,
            sample_ids_B=batch.sample_ids_B,
            step=batch.step,
        )
