"""States that a network visits on its own: its few-step trajectory from pure mask down to the times of a batch.

The student's (on-policy: the teacher then labels what the student will meet when it samples), the teacher's, or
for a share of the samples only. Which positions are masked is no different from corrupted data, since both follow
from the same times of the positions: only the tokens between them are the network's instead of the corpus'. So the
number of rows that travel is known to all sides as before.

Shapes: B batch, L positions, N positions, G slots of an update's global batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.diffusion.coupling import Coordinates, rollout
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.distill.batch_plan import BatchPlan, Visited
from imdm_scale.distill.method import Distillation
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.parallel.engine import ModelEngine
from imdm_scale.parallel.transport import Dealing


@dataclass(frozen=True)
class VisitingNetwork:
    """This rank's part of the network whose trajectories they are."""

    model: ModelEngine
    plan: BatchPlan
    """The samples that its replica answers for."""
    method: Distillation
    """Says how it draws."""


@dataclass(frozen=True)
class Visitor:
    """This rank's part in the visits; one on every rank of the run."""

    network: VisitingNetwork | None
    """None where this rank has no part in the network."""
    plans: Sequence[BatchPlan]
    """Those of this rank, which are to know the states."""
    num_steps: int
    """Evaluations of the network on its way."""
    share: float
    """Of the samples whose states are the network's, in (0, 1]."""
    first_rank: int
    """Global rank of the network's that tells those without a part in it."""
    network_is_everywhere: bool
    """Whether all ranks have a part in it."""
    begins_with: int | None
    """The token that begins every text (BOS), which is given; None if there is none."""
    device: torch.device
    """This rank's."""

    def visit(self, step: int) -> float:
        """Have the states of update `step` visited and known to all plans; returns the seconds that it took.

        Collective over all ranks of the run. The blocks of the update are at hand.
        """
        begun = time.monotonic()
        plan = self.plans[0]
        shape = plan.global_batch_size, plan.stream.length
        ids_GL = torch.empty(shape, dtype=torch.int32, device=self.device)
        if self.network is not None:
            ids_GL = self._gather(self.network, step)
        if not self.network_is_everywhere:
            dist.broadcast(ids_GL, src=self.first_rank)
        u_G = uniform(plan.seed, plan.sample_ids(step), Purpose.VISIT, step, 1)[:, 0, 0]
        visited = Visited(step, ids_GL.to("cpu", torch.int64), u_G < self.share)
        for plan in self.plans:
            plan.visited = visited
        return time.monotonic() - begun

    def _gather(self, network: VisitingNetwork, step: int) -> Tensor:
        """What all replicas visited, int32 (G, L) in the order of the slots, on every rank of the network."""
        mine_BL = (
            self._trajectory(network, network.plan.joined(step)).to(self.device, torch.int32).contiguous()
        )
        dp_size = network.plan.dp_size
        parts = [torch.empty_like(mine_BL) for _ in range(dp_size)]
        dist.all_gather(parts, mine_BL, group=network.model.groups.mpu.dp)
        dealing: Dealing = network.plan.dealing
        slots_G = torch.tensor([slot for dp_rank in range(dp_size) for slot in dealing.slots(dp_rank)])
        ids_GL = torch.empty(
            dealing.global_batch_size, mine_BL.shape[1], dtype=torch.int32, device=self.device
        )
        ids_GL[slots_G.to(self.device)] = torch.cat(parts)
        return ids_GL

    def _trajectory(self, network: VisitingNetwork, batch: MicroBatch) -> Tensor:
        """The network's own way from pure mask to the times of a batch, int64 (B, L)."""
        mask_id = network.model.architecture.mask_token_id
        start_BL = torch.full_like(batch.x_t_BL, mask_id)
        if self.begins_with is not None:
            start_BL[:, 0] = self.begins_with
        u_BL = network.method.visiting_uniforms(batch, network.model.architecture)

        def tokens(x_BL: Tensor, positions_N: Tensor, u_N: Tensor) -> Tensor:
            return network.method.tokens(network.model, batch, x_BL, positions_N, u_N)

        # Masked is what is masked for the student, whose times of revelation are the same.
        noise = Coordinates(u_BL, batch.reveal_BL)
        return rollout(tokens, start_BL, noise, batch.t_B, self.num_steps, mask_id=mask_id)
