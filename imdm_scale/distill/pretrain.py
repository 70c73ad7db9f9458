"""Pretraining: the likelihood bound on data. Makes the teacher."""

from __future__ import annotations

from torch import Tensor

from imdm_scale.diffusion.likelihood import nelbo_terms
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.method import Method
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.rounds import Round


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

    def losses(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        target: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """The masked positions' terms of the bound."""
        device = logits_NV.device
        return nelbo_terms(
            logits_NV, micro_batch.labels_N.to(device), micro_batch.t_N.to(device), mask_id, vocabulary
        )
