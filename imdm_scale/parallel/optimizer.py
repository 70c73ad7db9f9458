"""AdamW, fused where the machine offers it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def apex_fused_adam() -> type | None:
    """NVIDIA apex's FusedAdam, or None.

    The test is for this class and not for a module called apex: the package of that name on PyPI is another.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def adamw(parameters: Iterable[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay: apex's on CUDA where it is installed, else torch's.

    Args:
        parameters: trainable parameters.
        options: lr, betas, eps, weight_decay.
    """
    if torch.cuda.is_available():
        fused = apex_fused_adam()
        if fused is not None:
            return fused(parameters, adam_w_mode=True, **options)
        return torch.optim.AdamW(parameters, fused=True, **options)
    return torch.optim.AdamW(parameters, **options)
