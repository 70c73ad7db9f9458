"""Micro-batches through the pipeline stages of one network: 1F1B for training, forward only for everything else.

Megatron-core's schedules drive a DeepSpeed engine, which DeepSpeed's own pipeline does not allow beyond ZeRO-1. With
one stage its schedule without a pipeline does, so there is one way for every layout.

Shapes: B batch, L positions, D noise dimensions, N selected positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from imdm_scale.model.layer import DropoutKey
from imdm_scale.model.stage import ImdmStage
from imdm_scale.parallel import compat
from imdm_scale.parallel.layout import RoleGroups

Result = TypeVar("Result")


@dataclass(frozen=True)
class NetworkInput:
    """What a network computes from; all micro-batches of one call have the same B and L."""

    input_ids_BL: Tensor
    """int64 token ids, masked positions holding the mask id."""
    mask_noise: Callable[[], Tensor]
    """Makes the noise e of every position, (B, L, D) float32, on the stage that reads it."""
    positions_N: Tensor
    """int64 row-major indices into (B, L): where the network's output is wanted."""
    dropout_key: DropoutKey | None = None
    """Needed in training where dropout is on."""


class _Chunk(nn.Module):
    """One stage as Megatron-core's schedules want to see it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, engine: Any, stage: ImdmStage, index: int, num_chunks: int) -> None:
        super().__init__()
        self.config = stage.config
        self.vp_stage = index if num_chunks > 1 else None
        self.set_input_tensor = stage.set_input_tensor
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.call = partial(engine, index)  # not the engine itself, which would become a submodule

    def forward(self, given: NetworkInput) -> Tensor:
        noise_BLD = given.mask_noise() if self.is_first else None
        ids_BL = given.input_ids_BL if self.is_first else None
        return self.call(ids_BL, noise_BLD, given.positions_N if self.is_last else None, given.dropout_key)


class Pipeline:
    """The stages of one network over the pipeline ranks of `groups`, this rank's part under `engine`."""

    def __init__(self, engine: Any, stages: Sequence[ImdmStage], groups: RoleGroups) -> None:
        self.engine, self.groups = engine, groups
        self.chunks: list[nn.Module] = [
            _Chunk(engine, stage, i, len(stages)) for i, stage in enumerate(stages)
        ]
        for stage in stages:
            # The loss comes normalised: the schedule must not divide it by the number of micro-batches.
            stage.config.calculate_per_token_loss = True
            stage.config.no_sync_func = self._before_last_micro_batch
            if len(stages) == 1:
                stage.config.deallocate_pipeline_outputs = groups.pp_size > 1
            else:
                # With two stages the one before and the one after are the same rank. Messages in one batch would be
                # taken for one another; sent one by one they keep their order. They are then under way while the
                # computation goes on, so what is sent must not be deallocated.
                stage.config.batch_p2p_comm, stage.config.overlap_p2p_comm = False, True
        self.chunks_left = len(self.chunks)
        self.is_partitioned = engine.zero_optimization()
        if groups.pp_size > 1 and self.is_partitioned and engine.optimizer is not None:
            compat.let_backward_follow_backward(engine)

    @property
    def micro_batch_unit(self) -> int:
        """What the number of micro-batches must be a multiple of: interleaved stages take turns in whole rounds."""
        return self.groups.pp_size if len(self.chunks) > 1 else 1

    def train(self, inputs: Sequence[NetworkInput], loss: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """Forward and backward passes of all micro-batches; gradients are reduced over replicas with the last.

        Args:
            loss: (the network's output, number of the micro-batch) -> scalar; called on the last stage.

        Returns:
            The micro-batches' losses, without gradient, on the last stage; an empty list elsewhere.
        """

        def finish(
            output: Tensor, index: int
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
            def evaluate(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                value = loss(output, index)
                # The clone: Megatron's schedule writes into the first.
                return value, torch.zeros((), dtype=torch.int, device=value.device), value.detach().clone()

            return output, evaluate

        if len(self.chunks) > 1 and self.engine.zero_optimization_partition_weights():
            compat.clear_gradient_partitions(self.engine)
        if self.is_partitioned:
            return self._run(inputs, finish, forward_only=False)
        with compat.backward_outside_engine(self.engine):
            losses = self._run(inputs, finish, forward_only=False)
        self.engine.allreduce_gradients()
        return losses

    @torch.no_grad()
    def infer(self, inputs: Sequence[NetworkInput], result: Callable[[Tensor, int], Result]) -> list[Result]:
        """Forward passes of all micro-batches.

        Args:
            result: (the network's output, number of the micro-batch) -> what to keep of it; called on the last
                stage, so that outputs of several micro-batches need not exist at a time.

        Returns:
            The results on the last stage; an empty list elsewhere.
        """
        return self._run(inputs, lambda output, index: (result(output, index), None), forward_only=True)

    def _run(
        self,
        inputs: Sequence[NetworkInput],
        finish: Callable[[Tensor, int], tuple[Any, Any]],
        forward_only: bool,
    ) -> list[Any]:
        compat.set_deepspeed_mpu(self.groups.mpu)
        self.chunks_left = len(self.chunks)
        batch, length = inputs[0].input_ids_BL.shape
        collection, num_chunks = self.groups.collection, len(self.chunks)

        def step(data: Iterator[tuple[int, NetworkInput]], chunk: _Chunk) -> tuple[Any, Any]:
            index, given = next(data)
            output = chunk(given)
            return finish(output, index) if chunk.is_last else (output, None)

        schedules = compat.pipeline_schedules()
        forward_backward = schedules.get_forward_backward_func(
            pp_size=self.groups.pp_size, vp_size=num_chunks if num_chunks > 1 else None
        )
        return forward_backward(
            forward_step_func=step,
            data_iterator=[iter(enumerate(inputs)) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(inputs),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(collection.pp, self.chunks[0].config),
            pg_collection=collection,
        )

    @contextlib.contextmanager
    def _before_last_micro_batch(self) -> Iterator[None]:
        """Megatron-core leaves this before the last backward pass of every chunk, and enters it again after.

        The engine reduces all gradients at one time, in the last backward pass of the last chunk.
        """
        self.engine.set_gradient_accumulation_boundary(self.chunks_left <= 0)
        try:
            yield
        finally:
            self.chunks_left -= 1
            self.engine.set_gradient_accumulation_boundary(self.chunks_left <= 0)
