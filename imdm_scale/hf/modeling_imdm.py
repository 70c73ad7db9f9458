"""The IMDM in plain torch as a transformers model. This file travels with exported checkpoints.

A masked diffusion transformer whose mask carries continuous noise e: the input of a position is
E[x] + 1[x = mask] g(e), with g a two-layer perceptron whose last layer starts at zero (IMDM, arXiv
2605.10518). The rest is MDLM's backbone (arXiv 2406.07524) with its time-independent adaLN folded away: a
pre-norm transformer with rotary embeddings, full attention and a tanh-GELU MLP. With RMSNorm, SwiGLU and no biases
it is LLaDA's (arXiv 2502.09992).

Shapes: B batch, L length, D noise dimensions, V vocabulary, H hidden width, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from ..diffusion.sampler import SamplerSettings, sample
from .configuration_imdm import ImdmConfig
from .layers_imdm import Block, FiniteMaskEmbedding, MaskEmbedding, build_norm, rotary_angles


class ImdmForMaskedLM(PreTrainedModel):
    """Infinite Mask Diffusion Model; with `noise_dim` 0 a plain masked diffusion model.

    A fresh model's mask embedding is zero, so it is the masked diffusion model bit for bit until it is
    trained. `vocabulary_rank`, int64 (V,), is each token's place in the order in which an inverse CDF draws
    them, None where that is the order of ids.
    """

    config_class = ImdmConfig
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _input_embed_layer = "token_embedding"

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask_embedding: MaskEmbedding | FiniteMaskEmbedding | None = None
        if config.num_masks:
            self.mask_embedding = FiniteMaskEmbedding(config)
        elif config.noise_dim:
            self.mask_embedding = MaskEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = build_norm(config.hidden_size, config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        ranked = config.vocabulary_order != "identity"
        self.register_buffer("vocabulary_rank", torch.arange(config.vocab_size) if ranked else None)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of the reference implementations, by module; called by transformers."""
        masks = self.mask_embedding
        if isinstance(masks, MaskEmbedding) and module is masks.dense_in:
            init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            init.zeros_(module.bias)
        elif masks is not None and module in masks.initially_zero:
            init.zeros_(module.weight)
        elif module is self.head:
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / math.sqrt(self.config.hidden_size)
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def draw_mask_noise(self, batch: int, length: int) -> Tensor:
        """Noise e, (batch, length, noise_dim) float32, from torch's generator."""
        shape = (batch, length, self.config.noise_dim)
        device = self.token_embedding.weight.device
        if self.config.noise_kind == "uniform":
            noise_BLD = 2 * torch.rand(shape, dtype=torch.float32, device=device) - 1
        else:
            noise_BLD = torch.randn(shape, dtype=torch.float32, device=device)
        return self.config.noise_scale * noise_BLD

    def forward(
        self,
        input_ids: Tensor,
        mask_noise: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Raw logits of every position.

        Args:
            input_ids: (B, L) integer; the mask token stands where a token is to be predicted.
            mask_noise: (B, L, D) float, read at the masked positions only; None draws it afresh from torch's
                generator. In float32 also where the weights are narrower: its Fourier features need the digits.
            attention_mask: (B, L), 1 (or True) for the positions that may be attended to; None for all. Every
                row needs one.
            labels: (B, L) integer token ids, -100 where no loss is taken.

        Returns:
            `logits` (B, L, V), the head's outputs with no rule applied to the mask token or to unmasked
            positions; `loss`, the mean cross-entropy in float32 over the positions with a label, if `labels`
            are given.

        Raises:
            ValueError: `mask_noise` does not have the shape (B, L, D).
        """
        batch, length = input_ids.shape
        x_BLH = self.token_embedding(input_ids)
        if self.mask_embedding is not None:
            if mask_noise is None:
                mask_noise = self.draw_mask_noise(batch, length)
            if mask_noise.shape != (batch, length, self.config.noise_dim):
                raise ValueError(
                    f"mask_noise has shape {tuple(mask_noise.shape)}, "
                    f"expected {(batch, length, self.config.noise_dim)}"
                )
            masked_BL1 = (input_ids == self.config.mask_token_id).unsqueeze(-1)
            g_BLH = self.mask_embedding(mask_noise)
            x_BLH = torch.where(masked_BL1, x_BLH + g_BLH, x_BLH)

        head_dim = self.config.hidden_size // self.config.num_heads
        cos_LK, sin_LK = rotary_angles(length, head_dim, self.config.rope_base, x_BLH.device)
        attend_B11L = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x_BLH = block(x_BLH, cos_LK, sin_LK, attend_B11L)
        logits_BLV = self.head(self.final_norm(x_BLH))

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return MaskedLMOutput(loss=loss, logits=logits_BLV)

    @torch.no_grad()
    def generate_text(
        self,
        num_samples: int,
        num_steps: int,
        seed: int,
        prefix_ids: Sequence[int] | Tensor | None = None,
        length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        fixed_noise: bool = False,
        greedy_last_step: bool = False,
        sampler: str | None = None,
    ) -> Tensor:
        """Sample token ids in `num_steps` evaluations of the network, in evaluation mode, without gradient.

        All randomness is a function of (seed, index of the sample), so sample i does not depend on
        `num_samples`.

        Args:
            num_samples: how many texts.
            num_steps: network evaluations.
            seed: in [0, 2^64).
            prefix_ids: (P,) ids that begin every text, or (num_samples, P) ids that begin each. Positions
                that hold the mask token are sampled, so a template with gaps is filled. Without a prefix,
                position 0 is `config.bos_token_id` where that is set (training blocks begin with it); with
                one, the first id of the prefix stands at position 0 and nothing is put before it.
            length: positions of a text, prefix included; None takes `config.length`.
            temperature, top_p: of the token distributions.
            fixed_noise: keep the masks' noise over the whole trajectory; False redraws it where the reverse
                posterior resets it.
            greedy_last_step: take the most likely token in the last step.
            sampler: "ancestral", "coupled" or "coupled_argmax" (`SAMPLERS`); None takes the config's, for which
                the network was trained.

        Returns:
            (num_samples, length) int64 token ids on the model's device.

        Raises:
            ValueError: the prefix does not fit the length, the number of samples or the vocabulary, or a
                sampler setting is out of range.
        """
        config = self.config
        settings = SamplerSettings(
            num_steps=num_steps,
            temperature=temperature,
            top_p=top_p,
            greedy_last_step=greedy_last_step,
            fixed_noise=fixed_noise,
            sampler=config.sampler if sampler is None else sampler,
        )
        x_BL = torch.full(
            (num_samples, config.length if length is None else length),
            config.mask_token_id,
            device=self.device,
        )
        if prefix_ids is None:
            prefix_ids = [] if config.bos_token_id is None else [config.bos_token_id]
        prefix = torch.as_tensor(prefix_ids, dtype=torch.int64, device=self.device)
        if prefix.shape[-1] > x_BL.shape[1]:
            raise ValueError(
                f"the prefix has {prefix.shape[-1]} ids, more than the {x_BL.shape[1]} of the text"
            )
        if prefix.ndim == 2 and len(prefix) != num_samples:
            raise ValueError(f"there are {len(prefix)} prefixes for {num_samples} samples")
        if prefix.numel() and not 0 <= prefix.min() <= prefix.max() < config.vocab_size:
            raise ValueError(f"prefix_ids has an id outside [0, {config.vocab_size})")
        x_BL[:, : prefix.shape[-1]] = prefix

        was_training = self.training
        self.eval()
        try:
            return sample(
                lambda ids_BL, noise_BLD: self(ids_BL, mask_noise=noise_BLD).logits,
                x_BL,
                settings=settings,
                seed=seed,
                sample_ids_B=torch.arange(num_samples, device=self.device),
                mask_id=config.mask_token_id,
                noise_dim=config.noise_dim,
                noise_kind=config.noise_kind,
                noise_scale=config.noise_scale,
                rank_V=self.vocabulary_rank,
            )
        finally:
            self.train(was_training)
