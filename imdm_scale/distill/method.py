"""The interface of a training method. A method sees networks and micro-batches, never ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.rounds import Round
from imdm_scale.parallel.engine import ModelEngine, Teacher


class Method(ABC):
    """What the training loop asks of a method."""

    @abstractmethod
    def round_at(self, step: int) -> Round | None:
        """The round that update `step` belongs to; None when the method's schedule is over.

        At the start of every round but the first, the student becomes the teacher.
        """

    @abstractmethod
    def normaliser(self, micro_batch: MicroBatch) -> int:
        """This micro-batch's share of the number by which the global sum of losses is divided."""

    @abstractmethod
    def losses(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        target: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """What each masked position of a micro-batch adds to the sum of losses: (N,) with a gradient.

        Args:
            logits_NV: the student's, raw, at the masked positions.
            target: what the teacher says of these positions, in the form of `Distillation.shows`: raw logits (N, V) or
                token ids, int64 (N,); None for a method without a teacher.
            vocabulary: how the columns of all logits map to token ids.
        """


class Shows(Enum):
    """What a teacher tells of a masked position."""

    DISTRIBUTION = auto()
    """Its prediction. Final hidden states travel, and its head is applied where the loss is computed."""
    TOKEN = auto()
    """A token."""


class Distillation(Method):
    """A method with a teacher."""

    shows: Shows
    """The form of what the student learns from."""

    def normaliser(self, micro_batch: MicroBatch) -> int:
        """The masked positions: the loss is a mean over those of the global batch."""
        return micro_batch.positions_N.numel()

    @abstractmethod
    def teach(self, teacher: Teacher, batch: MicroBatch) -> Tensor | None:
        """What the student learns from, a row for each masked position: final hidden states (N, H), or int64 (N, 1).

        Collective over the teacher's ranks of one replica.

        Args:
            batch: all samples that this replica answers for in an update.

        Returns:
            Rows on the teacher's last stage, None elsewhere.
        """

    @abstractmethod
    def teacher_evaluations(self, step: int) -> int:
        """How often the teacher evaluates each sample of update `step`."""

    def visiting_uniforms(self, batch: MicroBatch, architecture: Architecture) -> Tensor:
        """float64 (B, L): from which a network draws the token of each position on its way to a batch's states."""
        length = batch.x_t_BL.shape[1]
        purpose = Purpose.VISIT_TOKEN
        return uniform(batch.seed, batch.sample_ids_B, purpose, batch.step, length, dtype=torch.float64)[
            ..., 0
        ]

    def tokens(
        self, network: ModelEngine, batch: MicroBatch, x_BL: Tensor, positions_N: Tensor, u_N: Tensor
    ) -> Tensor:
        """A network's tokens (N,) for some positions of a batch in state x, on every rank of the network.

        It sees the batch's own noise, and draws as `drawing` says.
        """
        return network.tokens(
            x_BL,
            lambda rows: batch.mask_noise(network.architecture, network.device, rows),
            positions_N,
            u_N,
            **self.drawing(network, batch.step),
        )

    def drawing(self, network: ModelEngine, step: int) -> dict[str, Any]:
        """How a network draws in update `step` of this method: keywords of `ModelEngine.tokens`."""
        return {}
