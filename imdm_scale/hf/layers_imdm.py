"""The layers of the IMDM in plain torch. This file travels with exported checkpoints.

Shapes: B batch, L length, D noise dimensions, F inner width, H hidden width, A heads, K width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.finite_masks import mask_index
from ..diffusion.fourier import FEATURES_PER_FREQUENCY, fourier_features
from .configuration_imdm import ImdmConfig


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 (or wider), whatever the type of its input; returns the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467), in float32 (or wider) as `LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


def build_norm(size: int, config: ImdmConfig) -> LayerNorm | RMSNorm:
    """The configured norm over a last dimension of `size`."""
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.layer_norm_eps)
    return LayerNorm(size, eps=config.layer_norm_eps, bias=config.bias)


def rotary_angles(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim), float32, of RoPE (arXiv 2104.09864): angle l * base^(-2i/K)."""
    inverse_frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle_LK = torch.outer(torch.arange(length, device=device).float(), inverse_frequency).repeat(1, 2)
    return angle_LK.cos(), angle_LK.sin()


def rotate(x_BALK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotate the pairs (i, i + K/2) of every head, in the type of `x_BALK`."""
    first, second = x_BALK.chunk(2, dim=-1)
    rotated_BALK = torch.cat((-second, first), dim=-1)
    return x_BALK * cos_LK.to(x_BALK.dtype) + rotated_BALK * sin_LK.to(x_BALK.dtype)


class MaskEmbedding(nn.Module):
    """g(e) = W2 GELU(W1 e + Wf f(e) + b1): what a masked position's noise adds to the mask token's embedding.

    f are the noise's Fourier features, if the network has any. The last layer has no bias, since the mask
    token's embedding serves as one.
    """

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__()
        self.dense_in = nn.Linear(config.noise_dim, 4 * config.hidden_size)
        self.dense_out = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)
        self.noise_law = (config.noise_kind, config.noise_scale)
        self.num_frequencies = config.noise_fourier
        self.dense_fourier = None
        if config.noise_fourier:
            num_features = FEATURES_PER_FREQUENCY * config.noise_fourier
            self.dense_fourier = nn.Linear(num_features, 4 * config.hidden_size, bias=False)
        self.initially_zero = (self.dense_out, self.dense_fourier)

    def forward(self, noise_BLD: Tensor) -> Tensor:
        """(B, L, D) float32 -> (B, L, H) in the weights' type."""
        dtype = self.dense_in.weight.dtype
        inner_BLF = self.dense_in(noise_BLD.to(dtype))
        if self.dense_fourier is not None:
            features_BLK = fourier_features(noise_BLD, self.num_frequencies, *self.noise_law)
            inner_BLF = inner_BLF + self.dense_fourier(features_BLK.to(dtype))
        return self.dense_out(F.gelu(inner_BLF))


class FiniteMaskEmbedding(nn.Module):
    """g(e) is one of K vectors, by which K-th of its range the noise's first dimension lies in."""

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.num_masks, config.hidden_size)
        self.initially_zero = (self.table,)
        self.noise_law = (config.noise_kind, config.noise_scale)

    def forward(self, noise_BLD: Tensor) -> Tensor:
        """(B, L, D) float32 -> (B, L, H) in the weights' type."""
        return self.table(mask_index(noise_BLD, self.table.num_embeddings, *self.noise_law))


class Attention(nn.Module):
    """Multi-head attention of every position to every attended position."""

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.softcap = config.attention_softcap
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            head_dim = config.hidden_size // config.num_heads
            self.q_norm = build_norm(head_dim, config)
            self.k_norm = build_norm(head_dim, config)

    def forward(self, x_BLH: Tensor, cos_LK: Tensor, sin_LK: Tensor, attend_B11L: Tensor | None) -> Tensor:
        qkv = self.qkv(x_BLH).unflatten(-1, (3, self.num_heads, -1))
        q_BALK, k_BALK, v_BALK = qkv.permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q_BALK, k_BALK = self.q_norm(q_BALK), self.k_norm(k_BALK)
        q_BALK, k_BALK = rotate(q_BALK, cos_LK, sin_LK), rotate(k_BALK, cos_LK, sin_LK)
        if self.softcap > 0:
            y_BALK = softcapped_attention(q_BALK, k_BALK, v_BALK, attend_B11L, self.softcap)
        else:
            y_BALK = F.scaled_dot_product_attention(q_BALK, k_BALK, v_BALK, attn_mask=attend_B11L)
        return self.out(y_BALK.transpose(1, 2).flatten(2))


def softcapped_attention(
    q_BALK: Tensor, k_BALK: Tensor, v_BALK: Tensor, attend_B11L: Tensor | None, softcap: float
) -> Tensor:
    """Attention with scores bounded as softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118)."""
    scores_BALL = q_BALK @ k_BALK.transpose(-1, -2) / math.sqrt(q_BALK.shape[-1])
    scores_BALL = softcap * torch.tanh(scores_BALL / softcap)
    if attend_B11L is not None:
        scores_BALL = scores_BALL.masked_fill(~attend_B11L, -math.inf)
    return scores_BALL.softmax(-1) @ v_BALK


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them, or SwiGLU (arXiv 2002.05202): W2 (silu(Wg x) * Wu x), where
    `dense_in` is Wg above Wu."""

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp == "swiglu"
        num_inputs = (2 if self.is_gated else 1) * config.mlp_size
        self.dense_in = nn.Linear(config.hidden_size, num_inputs, bias=config.bias)
        self.dense_out = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x_BLH: Tensor) -> Tensor:
        inner_BLF = self.dense_in(x_BLH)
        if self.is_gated:
            gate_BLF, up_BLF = inner_BLF.chunk(2, dim=-1)
            return self.dense_out(F.silu(gate_BLF) * up_BLF)
        return self.dense_out(F.gelu(inner_BLF, approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ImdmConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm1 = build_norm(config.hidden_size, config)
        self.attention = Attention(config)
        self.norm2 = build_norm(config.hidden_size, config)
        self.mlp = Mlp(config)

    def forward(self, x_BLH: Tensor, cos_LK: Tensor, sin_LK: Tensor, attend_B11L: Tensor | None) -> Tensor:
        y_BLH = self.attention(self.norm1(x_BLH), cos_LK, sin_LK, attend_B11L)
        x_BLH = x_BLH + F.dropout(y_BLH, self.dropout, self.training)
        y_BLH = self.mlp(self.norm2(x_BLH))
        return x_BLH + F.dropout(y_BLH, self.dropout, self.training)
