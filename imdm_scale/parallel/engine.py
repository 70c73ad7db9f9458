"""The student and the teacher, each one network in one DeepSpeed engine.

Shapes: B batch, L positions, D noise dimensions, N selected positions, V one shard of the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.model.layer import DropoutKey
from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.vocabulary import ShardedVocabulary
from imdm_scale.model.weights import load_weights, placements
from imdm_scale.parallel import compat
from imdm_scale.parallel.layout import RoleLayout
from imdm_scale.parallel.optimizer import adamw


class ModelEngine:
    """A network under DeepSpeed. `Student` and `Teacher` are its two kinds."""

    def __init__(self, stage: ImdmStage, layout: RoleLayout, engine: Any) -> None:
        self.stage, self.layout, self.engine = stage, layout, engine

    @property
    def architecture(self) -> Architecture:
        """Shape of the network."""
        return self.stage.architecture

    @property
    def vocabulary(self) -> ShardedVocabulary:
        """How the columns of `logits` map to token ids."""
        return self.stage.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the inputs must be."""
        return self.engine.device

    def logits(
        self,
        input_ids_BL: Tensor,
        mask_noise_BLD: Tensor,
        positions_N: Tensor,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """Raw logits (N, V) of the positions with row-major indices `positions_N` into (B, L)."""
        compat.set_deepspeed_mpu(self.layout.mpu)
        return self.engine(input_ids_BL, mask_noise_BLD, positions_N, dropout_key)

    def predict(self, input_ids_BL: Tensor, mask_noise_BLD: Tensor) -> Tensor:
        """Raw logits of every position over the whole vocabulary, (B, L, V), as the sampler wants them."""
        batch, length = input_ids_BL.shape
        positions_N = torch.arange(batch * length, device=input_ids_BL.device)
        with torch.no_grad():
            logits_NV = self.vocabulary.gather(self.logits(input_ids_BL, mask_noise_BLD, positions_N))
        return logits_NV[:, : self.architecture.vocab_size].unflatten(0, (batch, length))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode (no dropout) inside the block, the mode before after it."""
        was_training = self.engine.training
        self.engine.eval()
        try:
            yield
        finally:
            self.engine.train(was_training)


class Student(ModelEngine):
    """The network that is trained."""

    def __init__(
        self, stage: ImdmStage, layout: RoleLayout, ds_config: dict[str, Any], **adam_options: Any
    ) -> None:
        for parameter, placement in placements(stage):
            compat.tag_for_grad_norm(parameter, placement.shard_dim is not None)
        self.optimizer = adamw(stage.parameters(), **adam_options)
        engine, *_ = deepspeed.initialize(
            model=stage, optimizer=self.optimizer, config=ds_config, mpu=layout.mpu
        )
        super().__init__(stage, layout, engine)

    def backward(self, loss: Tensor, is_last_micro_batch: bool) -> None:
        """Accumulate gradients; they are reduced over the data-parallel ranks with the last micro-batch."""
        compat.set_deepspeed_mpu(self.layout.mpu)
        self.engine.set_gradient_accumulation_boundary(is_last_micro_batch)
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient's global norm before clipping."""
        compat.set_deepspeed_mpu(self.layout.mpu)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


class Teacher(ModelEngine):
    """The frozen network that the student learns from."""

    def __init__(self, stage: ImdmStage, layout: RoleLayout, student_ds_config: dict[str, Any]) -> None:
        stage.requires_grad_(False)
        engine, *_ = deepspeed.initialize(
            model=stage, config=teacher_ds_config(student_ds_config), mpu=layout.mpu
        )
        super().__init__(stage, layout, engine)
        engine.eval()

    @torch.no_grad()
    def load(self, whole_tensor: Callable[[str], Tensor]) -> None:
        """Take weights from whole tensors (canonical name -> tensor); each rank keeps only its own part."""
        for parameter, placement in placements(self.stage):
            shard = placement.to_shard(whole_tensor(placement.name), self.layout.tp_rank, self.layout.tp_size)
            partition = compat.partition_of(parameter)
            if partition is None:
                parameter.copy_(shard)
            else:
                mine = shard.flatten().split(partition.numel())[self.layout.dp_rank :][:1]
                for part in mine:  # none where the padding reaches over whole ranks
                    partition[: part.numel()].copy_(part)
        compat.release_whole_parameters(self.engine)

    @torch.no_grad()
    def take_weights(self, student: Student) -> None:
        """Become the student, shard by shard: no weight leaves the rank that holds it.

        Both must have the same architecture and layout.
        """
        for mine, theirs in zip(self.stage.parameters(), student.stage.parameters(), strict=True):
            my_shard, their_shard = compat.partition_of(mine), compat.partition_of(theirs)
            if my_shard is None:
                assert their_shard is None, "teacher and student are partitioned alike"
                mine.copy_(theirs)
            else:
                assert their_shard is not None and my_shard.shape == their_shard.shape
                my_shard.copy_(their_shard)
        compat.release_whole_parameters(self.engine)


def teacher_ds_config(student_ds_config: dict[str, Any]) -> dict[str, Any]:
    """The teacher's DeepSpeed configuration: the student's partitioning and precision, no optimizer.

    ZeRO-1 and ZeRO-2 partition nothing that a frozen network has, so there the teacher is replicated.
    No parameter persists unpartitioned, so that `Teacher.take_weights` need only write partitions.
    """
    zero = student_ds_config["zero_optimization"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": student_ds_config["train_micro_batch_size_per_gpu"],
        "zero_optimization": {"stage": 0},
    }
    if zero["stage"] == 3:
        kept = {key: zero[key] for key in zero if key.startswith("stage3_") or key == "offload_param"}
        config["zero_optimization"] = {**kept, "stage": 3, "stage3_param_persistence_threshold": 0}
    if "bf16" in student_ds_config:
        config["bf16"] = student_ds_config["bf16"]
    return config


def build_stage(
    architecture: Architecture, layout: RoleLayout, dtype: torch.dtype, whole_tensor: Callable[[str], Tensor]
) -> ImdmStage:
    """This rank's part of a network, filled from whole tensors (canonical name -> float tensor)."""
    stage = ImdmStage(architecture, layout.collection, dtype)
    load_weights(stage, whole_tensor, layout.tp_rank, layout.tp_size)
    return stage
