"""The interface of a training method. A method sees networks and micro-batches, never ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from imdm_scale.diffusion.vocabulary import Vocabulary
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.parallel.engine import Teacher


@dataclass(frozen=True)
class Round:
    """A stretch of updates with one teacher."""

    index: int
    """Number of the round, from 0."""
    starts: bool
    """Whether the update asked about is the round's first."""
    teacher_steps: float | None = None
    """Sampling steps whose size the teacher takes; the student learns to take half as many."""


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
    def loss(
        self,
        micro_batch: MicroBatch,
        logits_NV: Tensor,
        teacher_logits_NV: Tensor | None,
        vocabulary: Vocabulary,
        mask_id: int,
    ) -> Tensor:
        """Sum (not mean) of the losses of this micro-batch's positions: a scalar with a gradient.

        Args:
            logits_NV: the student's, raw, at the masked positions.
            teacher_logits_NV: the teacher's head on what `teach` returned for these positions; None without one.
            vocabulary: how the columns of both map to token ids.
        """


class Distillation(Method):
    """A method with a teacher."""

    @abstractmethod
    def teach(self, teacher: Teacher, batch: MicroBatch) -> Tensor | None:
        """The teacher's final hidden states (N, H) that the student learns from, at the masked positions.

        Collective over the teacher's ranks of one replica.

        Args:
            batch: all samples that this replica answers for in an update.

        Returns:
            Rows on the teacher's last stage, None elsewhere.
        """
