"""AdamW, fused where the machine offers it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""


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


def prepare_state(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> None:
    """Give each master tensor the state that AdamW would give it at its first update, where it has none."""
    if any(not optimizer.state[master] for master in masters):
        for master in masters:
            optimizer.state[master].update({name: torch.zeros_like(master) for name in MOMENTS})
        set_num_updates(optimizer, masters, 0)


def moments(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], name: str) -> list[Tensor]:
    """One of AdamW's `MOMENTS` for each master tensor (views: writing changes them)."""
    return [optimizer.state[master][name] for master in masters]


def num_updates(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> int:
    """Updates that the running means have seen."""
    if _counts_by_group(optimizer):
        return int(optimizer.param_groups[0].get("step", 0))
    return int(optimizer.state[masters[0]]["step"]) if masters else 0


def set_num_updates(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor], count: int) -> None:
    """Let the running means have seen `count` updates."""
    if _counts_by_group(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count
        return
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for master in masters:
        device = master.device if fused else "cpu"  # where torch keeps it
        optimizer.state[master]["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)


def reset(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> None:
    """Forget the running means, as if no update had been made."""
    prepare_state(optimizer, masters)
    for name in MOMENTS:
        for moment in moments(optimizer, masters, name):
            moment.zero_()
    set_num_updates(optimizer, masters, 0)


def _counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is apex's, which counts updates for a group of tensors; torch's counts them for each."""
    fused = apex_fused_adam()
    return fused is not None and isinstance(optimizer, fused)
