"""Perturbed rectified couplings: noisy states of data, and the texts to which a teacher leads them (IM-ReDi; ReDi,
arXiv 2502.08606; IMDM, arXiv 2605.10518).

Pair i is a function of (seed, i): its text of the data, its time, its masks, the noise of its masks, and every reveal,
reset and token of the sampler. In the authors' code the seed names the noise at the state only, and what is reset later
comes from a global generator.

Shapes: B pairs, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imdm_scale.data.pairs import Pairs
from imdm_scale.data.stream import TokenStream
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.sampling import fill_masks, over_replicas
from imdm_scale.parallel.engine import ModelEngine


class NoisyStates(NamedTuple):
    """What some pairs begin with."""

    x_t_BL: Tensor
    """int64."""
    t_B: Tensor
    """float64 times that are exact in float32."""


def noisy_states(seed: int, numbers_B: Tensor, x_0_BL: Tensor, t_min: float, mask_id: int) -> NoisyStates:
    """Texts at times of their own: t uniform on [t_min, 1), each position masked with probability exactly t.

    Args:
        seed, numbers_B: name the draws; `numbers_B` is int64.
        t_min: in (0, 1]; 1 masks everything. A floor above 0 keeps the loss, which is divided by t, bounded.
    """
    u_B = uniform(seed, numbers_B, Purpose.PAIR_TIME, 0, 1)[:, 0, 0]
    t_B = (t_min + (1.0 - t_min) * u_B.double()).float().clamp(min=np.float32(t_min), max=1.0).double()
    masked_BL = own_times(seed, numbers_B, x_0_BL.shape[1]) < t_B[:, None]
    return NoisyStates(x_0_BL.masked_fill(masked_BL, mask_id), t_B)


def own_times(seed: int, numbers_B: Tensor, length: int) -> Tensor:
    """The times of some pairs' positions, float64 (B, L): one is masked where its own lies below t."""
    return uniform(seed, numbers_B, Purpose.MASK, 0, length, dtype=torch.float64)[..., 0]


@dataclass(frozen=True)
class PairMaker:
    """Makes pairs with a network over ranks."""

    network: ModelEngine
    stream: TokenStream
    """Of the data; pair i begins with its sample i."""
    settings: SamplerSettings
    seed: int
    t_min: float
    batch_size: int
    """Pairs that a replica samples at a time."""

    def make(self, numbers: range, after_batch: Callable[[int], None] = lambda count: None) -> Pairs:
        """Some pairs, the same for every number of ranks and every batch size. Collective.

        Args:
            after_batch: called with the number of pairs that all replicas have just made together.
        """
        network, groups = self.network, self.network.groups
        together = self.batch_size * groups.dp_size
        states, texts = [], []
        for first in range(numbers.start, numbers.stop, together):
            # Numbers beyond the last one fill the batch and are dropped: partitioned weights are gathered in step.
            all_B = torch.arange(first, first + together).clamp(max=numbers.stop - 1)
            states.append(self._states(all_B))
            mine = slice(groups.dp_rank * self.batch_size, (groups.dp_rank + 1) * self.batch_size)
            mine_BL = fill_masks(
                network,
                self.settings,
                states[-1].x_t_BL[mine].to(network.device),
                all_B[mine].to(network.device),
                self.seed,
                start_time=states[-1].t_B[mine].to(network.device),
            )
            texts.append(over_replicas(network, mine_BL).cpu())
            after_batch(min(together, numbers.stop - first))
        count = len(numbers)
        return Pairs(
            torch.cat([state.x_t_BL for state in states])[:count].numpy(),
            torch.cat(texts)[:count].numpy(),
            torch.cat([state.t_B for state in states])[:count].float().numpy(),
            np.arange(numbers.start, numbers.stop, dtype=np.int64),
        )

    def _states(self, numbers_B: Tensor) -> NoisyStates:
        """Every rank of every replica reads them: few integers, once in as many evaluations as there are steps."""
        x_0_BL = self.stream.fetch(numbers_B.numpy())
        mask_id = self.network.architecture.mask_token_id
        return noisy_states(self.seed, numbers_B, x_0_BL, self.t_min, mask_id)
