"""LLaDA's network written from its description, to check what was imported against.

Nothing is shared with this project's networks: the tensors have LLaDA's names, the configuration its fields. Llama's
network (arXiv 2302.13971) with full attention (arXiv 2502.09992).

Shapes: B batch, L positions, V vocabulary, H width, F inner width, A heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imdm_scale.checkpoint.llada_config import read_config
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from imdm_scale.hf.weight_files import open_weights


@torch.no_grad()
def llada_logits(config: Mapping[str, Any], tensor: Callable[[str], Tensor], ids_BL: Tensor) -> Tensor:
    """Logits (B, L, V), float32, of LLaDA's network.

    Args:
        config: fields of its config.json.
        tensor: its name of a tensor -> the tensor; each is asked for once, and no more than one layer's are held.
        ids_BL: int64 token ids.
    """

    def weight(name: str) -> Tensor:
        return tensor(f"model.transformer.{name}.weight").to(ids_BL.device, torch.float32)

    def rms_norm(x_BLH: Tensor, name: str) -> Tensor:
        mean_square_BL1 = (x_BLH * x_BLH).mean(-1, keepdim=True)
        return x_BLH / torch.sqrt(mean_square_BL1 + config["rms_norm_eps"]) * weight(name)

    def by_head(y_BLH: Tensor) -> Tensor:
        batch, length, width = y_BLH.shape
        return y_BLH.view(batch, length, config["n_heads"], width // config["n_heads"])

    def rotated(x_BLAK: Tensor) -> Tensor:
        """Pair (i, i + K/2) of position l as a complex number, turned by the angle l theta^(-2i/K)."""
        length, half = x_BLAK.size(1), x_BLAK.size(-1) // 2
        frequency_K = config["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
        angle_LK = torch.arange(length, dtype=torch.float64)[:, None] * frequency_K
        turn_L1K = torch.exp(1j * angle_LK)[:, None].to(x_BLAK.device, torch.complex64)
        pairs = torch.complex(x_BLAK[..., :half], x_BLAK[..., half:]) * turn_L1K
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x_BLH = weight("wte")[ids_BL]
    for i in range(config["n_layers"]):
        block = f"blocks.{i}."
        y_BLH = rms_norm(x_BLH, block + "attn_norm")
        q_BLAK, k_BLAK, v_BLAK = (
            by_head(y_BLH @ weight(block + name).T) for name in ("q_proj", "k_proj", "v_proj")
        )
        scores_BALL = (
            torch.einsum("blak,bmak->balm", rotated(q_BLAK), rotated(k_BLAK)) / q_BLAK.size(-1) ** 0.5
        )
        y_BLAK = torch.einsum("balm,bmak->blak", scores_BALL.softmax(-1), v_BLAK)
        x_BLH = x_BLH + y_BLAK.flatten(2) @ weight(block + "attn_out").T
        y_BLH = rms_norm(x_BLH, block + "ff_norm")
        gate_BLF = y_BLH @ weight(block + "ff_proj").T
        inner_BLF = gate_BLF * torch.sigmoid(gate_BLF) * (y_BLH @ weight(block + "up_proj").T)
        x_BLH = x_BLH + inner_BLF @ weight(block + "ff_out").T
    return rms_norm(x_BLH, "ln_f") @ weight("ff_out").T


@torch.no_grad()
def check_llada(folder: Path, model: ImdmForMaskedLM, *, batch: int = 2, length: int = 32) -> float:
    """The largest difference between a model's logits and those of the LLaDA folder it was made from, as a share of
    the largest logit.

    Of random texts, half masked, and of the ids that the model has kept. Below 1e-5 for a small model in float32; one
    in bfloat16 differs by its rounding. Mask noise, if the model has any, is drawn too: it must have no effect yet.

    Args:
        folder: LLaDA's.
        model: in evaluation mode, on any device.
        batch, length: of the texts.

    Raises:
        UserError: the folder cannot be read.
    """
    config = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, **read_config(folder)}
    device = model.token_embedding.weight.device
    tensor = open_weights(folder).tensor
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
    ids_BL[torch.rand(batch, length, generator=generator) < 0.5] = model.config.mask_token_id
    noise_BLD = 2 * torch.rand(batch, length, model.config.noise_dim, generator=generator) - 1
    ids_BL = ids_BL.to(device)
    found_BLV = model(ids_BL, mask_noise=noise_BLD.to(device)).logits
    expected_BLV = llada_logits(config, tensor, ids_BL)[..., : model.config.vocab_size]
    return ((found_BLV.float() - expected_BLV).abs().max() / expected_BLV.abs().max()).item()
