"""Pretraining: the likelihood bound on data. Makes the teacher."""

from __future__ import annotations

from torch import Tensor

from imdm_scale.diffusion.likelihood import nelbo_terms
from imdm_scale.distill.method import Method, Round
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.parallel.engine import Student, Teacher


class Pretrain(Method):
    """Negative evidence lower bound in nats per token (MDLM, arXiv 2406.07524; IMDM, arXiv 2605.10518).

    The infinite mask leaves the bound's form unchanged, because the masses of staying masked do not depend
    on the network.
    """

    def round_at(self, step: int) -> Round:
        """The one and only round."""
        return Round(index=0, starts=step == 0)

    def normaliser(self, micro_batch: MicroBatch) -> int:
        """All tokens count, the unmasked ones with loss zero."""
        return micro_batch.x_0_BL.numel()

    def loss(self, student: Student, teacher: Teacher | None, micro_batch: MicroBatch) -> Tensor:
        """Sum of the masked positions' terms of the bound."""
        logits_NV = student.logits(
            micro_batch.x_t_BL,
            micro_batch.mask_noise(student.architecture),
            micro_batch.positions_N,
            micro_batch.dropout_key,
        )
        return nelbo_terms(
            logits_NV,
            micro_batch.labels_N,
            micro_batch.t_N,
            student.architecture.mask_token_id,
            student.vocabulary,
        ).sum()
