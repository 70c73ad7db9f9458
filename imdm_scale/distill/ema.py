"""The running average of the student's weights, kept on the ZeRO shards and never gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from imdm_scale.parallel import compat
from imdm_scale.parallel.engine import Student


class Ema:
    """Exponential moving average of this rank's fp32 master shards.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) at update n, as in the reference of MDLM
    (kuleshov-group/mdlm, models/ema.py), so that the starting weights are soon forgotten.
    """

    def __init__(self, student: Student, decay: float) -> None:
        self.student = student
        self.decay = decay
        self.num_updates = 0
        self.shards = [shard.clone() for shard in compat.master_shards(student.engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, master in zip(self.shards, compat.master_shards(self.student.engine), strict=True):
            average.lerp_(master, 1 - decay)

    @contextlib.contextmanager
    def in_student(self) -> Iterator[None]:
        """The student has the averaged weights inside the block, its own again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, master in zip(self.shards, compat.master_shards(self.student.engine), strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        compat.publish_master_shards(self.student.engine)
