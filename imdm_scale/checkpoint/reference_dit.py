"""The reference networks of MDLM and IMDM in plain torch, adaLN and all, to check conversions against.

Written from the description of kuleshov-group/mdlm and Ugness/IMDM, models/dit.py: same parameters, same names, in the
same order, so that a published backbone loads with strict=True and its list of averaged weights can be matched by
order. Everything is computed in the weights' type, without autocast and dropout.

Shapes: B batch, L length, D noise dimensions, H hidden width, V vocabulary, C condition width, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SINUSOIDS = 256
"""Features of the noise level sigma."""
MLP_RATIO = 4


@dataclass(frozen=True)
class DitShape:
    """What fixes the network's parameters, and what its tensors do not tell."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    cond_size: int = 128
    noise_dim: int = 0
    num_masks: int = 0
    """K > 0: the mask embedding is a table of K vectors instead of a perceptron of the noise."""
    qk_norm: bool = False
    softcap: float = 0.0
    """c > 0 turns attention scores into c * tanh(scores / c)."""


class ReferenceDit(nn.Module):
    """MDLM's diffusion transformer, with IMDM's mask embedding, q/k norm and soft cap where the shape has them."""

    def __init__(self, shape: DitShape) -> None:
        super().__init__()
        self.vocab_embed = EmbeddingLayer(shape)
        self.sigma_map = TimestepEmbedder(shape.cond_size)
        self.rotary_emb = Rotary(shape.hidden_size // shape.num_heads)
        self.blocks = nn.ModuleList(DitBlock(shape) for _ in range(shape.num_layers))
        self.output_layer = FinalLayer(shape)

    def forward(
        self, ids_BL: Tensor, masked_BL: Tensor | None = None, noise: Tensor | None = None, sigma: float = 0.0
    ) -> Tensor:
        """Logits (B, L, V).

        Args:
            ids_BL: token ids.
            masked_BL: bool, where the mask embedding is added; unused where the network has none.
            noise: (B, L, D) of an infinite mask network, int64 (B, L) of one with finitely many masks.
            sigma: noise level; 0 is what networks without time conditioning see.
        """
        x_BLH = self.vocab_embed(ids_BL, masked_BL, noise)
        cond_1C = F.silu(self.sigma_map(torch.full((1,), sigma, device=ids_BL.device)))
        cos_LK, sin_LK = self.rotary_emb(ids_BL.shape[1])
        for block in self.blocks:
            x_BLH = block(x_BLH, cond_1C, cos_LK, sin_LK)
        return self.output_layer(x_BLH, cond_1C)


class EmbeddingLayer(nn.Module):
    """Token embedding, and what a masked position's noise adds to it."""

    def __init__(self, shape: DitShape) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(shape.vocab_size, shape.hidden_size))
        self.imdm_mlp: nn.Module | None = None
        if shape.num_masks:
            self.imdm_mlp = nn.Embedding(shape.num_masks, shape.hidden_size)
            self.imdm_mlp.weight.requires_grad = shape.num_masks > 1  # one mask is frozen at zero
        elif shape.noise_dim:
            inner = MLP_RATIO * shape.hidden_size
            self.imdm_mlp = nn.Sequential(
                nn.Linear(shape.noise_dim, inner), nn.GELU(), nn.Linear(inner, shape.hidden_size, bias=False)
            )

    def forward(self, ids_BL: Tensor, masked_BL: Tensor | None, noise: Tensor | None) -> Tensor:
        x_BLH = self.embedding[ids_BL]
        if self.imdm_mlp is None:
            return x_BLH
        assert masked_BL is not None and noise is not None, "the network has a mask embedding"
        return x_BLH + self.imdm_mlp(noise) * masked_BL[..., None].to(x_BLH.dtype)


class TimestepEmbedder(nn.Module):
    """A perceptron of the sinusoids of sigma."""

    def __init__(self, cond_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(NUM_SINUSOIDS, cond_size), nn.SiLU(), nn.Linear(cond_size, cond_size)
        )

    def forward(self, sigma_B: Tensor) -> Tensor:
        half = NUM_SINUSOIDS // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=sigma_B.device).float() / half)
        angle = sigma_B[:, None].float() * frequency
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.mlp[0].weight.dtype))


class Rotary(nn.Module):
    """Cosines and sines (L, K) of RoPE from the stored frequencies."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", rotary_frequencies(head_dim))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        position_L = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angle_LK = torch.outer(position_L, self.inv_freq).repeat(1, 2)
        return angle_LK.cos(), angle_LK.sin()


def rotary_frequencies(head_dim: int) -> Tensor:
    """The buffer `rotary_emb.inv_freq`, (head_dim / 2,) float32."""
    return 1.0 / (10_000 ** (torch.arange(0, head_dim, 2).float() / head_dim))


class Norm(nn.Module):
    """LayerNorm without a bias, computed in float32 (or wider)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), self.weight.shape).to(x.dtype) * self.weight


class DitBlock(nn.Module):
    """A transformer block whose norms are shifted and scaled, and whose branches are gated, by the condition."""

    def __init__(self, shape: DitShape) -> None:
        super().__init__()
        h, inner = shape.hidden_size, MLP_RATIO * shape.hidden_size
        self.num_heads, self.softcap = shape.num_heads, shape.softcap
        self.qk_norm = shape.qk_norm
        if shape.qk_norm:
            self.q_norm = nn.LayerNorm(h // shape.num_heads)
            self.k_norm = nn.LayerNorm(h // shape.num_heads)
        self.norm1 = Norm(h)
        self.attn_qkv = nn.Linear(h, 3 * h, bias=False)
        self.attn_out = nn.Linear(h, h, bias=False)
        self.norm2 = Norm(h)
        self.mlp = nn.Sequential(nn.Linear(h, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, h))
        self.adaLN_modulation = nn.Linear(shape.cond_size, 6 * h)

    def forward(self, x_BLH: Tensor, cond_1C: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond_1C)[:, None].chunk(6, -1)
        y_BLH = self._attend(self.norm1(x_BLH) * (1 + scale1) + shift1, cos_LK, sin_LK)
        x_BLH = x_BLH + gate1 * self.attn_out(y_BLH)
        return x_BLH + gate2 * self.mlp(self.norm2(x_BLH) * (1 + scale2) + shift2)

    def _attend(self, x_BLH: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
        q, k, v = self.attn_qkv(x_BLH).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_rotated(part, cos_LK.to(part.dtype), sin_LK.to(part.dtype)) for part in (q, k))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _rotated(x_BALK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    first, second = x_BALK.chunk(2, -1)
    return x_BALK * cos_LK + torch.cat((-second, first), -1) * sin_LK


class FinalLayer(nn.Module):
    """The last norm, shifted and scaled, and the head."""

    def __init__(self, shape: DitShape) -> None:
        super().__init__()
        self.norm_final = Norm(shape.hidden_size)
        self.linear = nn.Linear(shape.hidden_size, shape.vocab_size)
        self.adaLN_modulation = nn.Linear(shape.cond_size, 2 * shape.hidden_size)

    def forward(self, x_BLH: Tensor, cond_1C: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond_1C)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x_BLH) * (1 + scale) + shift)


def shape_of(tensors: Mapping[str, Tensor], num_heads: int, softcap: float = 0.0) -> DitShape:
    """The shape of a backbone from its tensors, which must be complete, and from what they do not tell."""
    vocab_size, hidden_size = tensors["vocab_embed.embedding"].shape
    first, table = (tensors.get(f"vocab_embed.imdm_mlp.{name}") for name in ("0.weight", "weight"))
    return DitShape(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=sum(name.endswith(".norm1.weight") for name in tensors),
        num_heads=num_heads,
        cond_size=len(tensors["sigma_map.mlp.0.bias"]),
        noise_dim=0 if first is None else first.shape[1],
        num_masks=0 if table is None else len(table),
        qk_norm="blocks.0.q_norm.weight" in tensors,
        softcap=softcap,
    )


def load_reference(tensors: Mapping[str, Tensor], shape: DitShape) -> ReferenceDit:
    """The network with the given tensors, in float32 and evaluation mode.

    Args:
        tensors: under the network's names. The rotary buffer may be missing; one that was rounded to bfloat16, which
            no network was trained with, is replaced by its exact value.

    Raises:
        RuntimeError: names or shapes are not those of the network (torch's strict loading).
    """
    with torch.device("meta"):
        network = ReferenceDit(shape)
    buffer = {"rotary_emb.inv_freq": rotary_frequencies(shape.hidden_size // shape.num_heads)}
    network.load_state_dict({**tensors, **buffer}, strict=True, assign=True)
    return network.float().eval()
