"""IM-ReDi: the likelihood bound on a teacher's own couplings, with the noise of each (IMDM, arXiv 2605.10518; ReDi,
arXiv 2502.08606)."""

from __future__ import annotations

from imdm_scale.distill.pretrain import Pretrain


class ImRedi(Pretrain):
    """The loss of pretraining, (1 / t) sum over masked positions of -log p(x_0 | x_t, e), on stored (x_t, x_0, t, e).

    x_0 is where a teacher went from x_t with this e (`pair_generation`), so text and state are coupled more tightly
    than data and masks: what is left to a few-step sampler is less total correlation. States come from
    `stored_pairs.StoredPairs`. On a plain masked diffusion model it is ReDi.
    """
