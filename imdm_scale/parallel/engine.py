"""The student and the teacher, each one network in one DeepSpeed engine.

Shapes: B batch, L positions, D noise dimensions, N selected positions, H width, V the vocabulary or one
shard of it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.diffusion.sampler import draw_tokens
from imdm_scale.diffusion.vocabulary_order import shard_of_ranks
from imdm_scale.model.head import FrozenHead
from imdm_scale.model.stage import ImdmStage
from imdm_scale.model.vocabulary import ShardedVocabulary
from imdm_scale.model.weights import PARTS, part_of, placements
from imdm_scale.parallel import compat, optimizer
from imdm_scale.parallel.layout import RoleGroups
from imdm_scale.parallel.network import StageChunks
from imdm_scale.parallel.schedule import NetworkInput, Pipeline
from imdm_scale.parallel.shards import WholeTensors, write_shard

NoiseOfRows = Callable[[slice], Tensor]
"""Rows of a batch -> the noise e of their positions, (rows, L, D) float32."""


class ModelEngine(ABC):
    """A network under DeepSpeed. `Student` and `Teacher` are its two kinds."""

    def __init__(self, module: StageChunks, groups: RoleGroups, engine: Any) -> None:
        self.module, self.groups, self.engine = module, groups, engine
        self.pipeline = Pipeline(engine, module.stages, groups)

    @property
    def stages(self) -> Sequence[ImdmStage]:
        """This rank's parts of the network."""
        return self.module.stages

    @property
    def architecture(self) -> Architecture:
        """Shape of the network."""
        return self.stages[0].architecture

    @property
    def vocabulary(self) -> ShardedVocabulary:
        """How the columns of logits map to token ids."""
        return self.stages[0].vocabulary

    @property
    def device(self) -> torch.device:
        """Where the inputs must be."""
        return self.engine.device

    @abstractmethod
    def logits(self, output: Tensor) -> Tensor:
        """Raw logits (N, V) from what the last stage computes."""

    def infer(
        self,
        input_ids_BL: Tensor,
        noise_of: NoiseOfRows,
        positions_N: Tensor,
        result: Callable[[Tensor, slice], Tensor],
    ) -> Tensor | None:
        """Something of every selected position, without gradient. Collective over the network's ranks.

        The batch passes in equal micro-batches, as large as divide it and the layout's micro-batch size allows.

        Args:
            result: (the last stage's output for some of the positions, which of them) -> one row each.

        Returns:
            The rows in the order of the positions on the last stage, None elsewhere.
        """
        batch, length = input_ids_BL.shape
        limit = self.groups.layout.micro_batch_size
        unit = self.pipeline.micro_batch_unit
        size = max(n for n in range(1, min(batch, limit) + 1) if batch % n == 0 and batch // n % unit == 0)
        # Micro-batch i has the positions from i * size * L on.
        starts = torch.arange(0, batch + 1, size, device=positions_N.device) * length
        bounds = torch.searchsorted(positions_N, starts).tolist()
        inputs = [
            NetworkInput(
                input_ids_BL[first : first + size].to(self.device),
                lambda first=first: noise_of(slice(first, first + size)).to(self.device),  # type: ignore[misc]
                (positions_N[low:high] - first * length).to(self.device),
            )
            for first, low, high in zip(range(0, batch, size), bounds, bounds[1:], strict=False)
        ]
        with self.evaluating():
            rows = self.pipeline.infer(
                inputs, lambda output, index: result(output, slice(bounds[index], bounds[index + 1]))
            )
        return torch.cat(rows) if self.groups.is_last_stage else None

    def draw(
        self,
        logits_NV: Tensor,
        u_N: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        rank_V: Tensor | None = None,
    ) -> Tensor:
        """Token ids (N,) by inverse CDF over the shards of the vocabulary, the same on all of them.

        Args:
            logits_NV: raw; the mask id is not drawn.
            u_N: float64 uniforms in [0, 1).
            greedy: take the likeliest token instead.
            rank_V: places of all tokens, those of other shards too, in the order in which they are drawn; None is
                the order of ids.
        """
        if rank_V is not None:
            rank_V = shard_of_ranks(rank_V.to(self.device), self.vocabulary.first_id, logits_NV.size(-1))
        return draw_tokens(
            logits_NV,
            u_N.to(self.device),
            mask_id=self.architecture.mask_token_id,
            temperature=temperature,
            top_p=top_p,
            greedy=greedy,
            vocabulary=self.vocabulary,
            rank_V=rank_V,
        )

    def tokens(
        self,
        input_ids_BL: Tensor,
        noise_of: NoiseOfRows,
        positions_N: Tensor,
        u_N: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        rank_V: Tensor | None = None,
    ) -> Tensor:
        """A token for every selected position, (N,) on every rank of the network: one step of sampling."""

        def drawn(output: Tensor, which: slice) -> Tensor:
            return self.draw(self.logits(output), u_N[which], temperature, top_p, greedy, rank_V)

        return self.from_last_stage(
            self.infer(input_ids_BL, noise_of, positions_N, drawn), positions_N.shape, torch.int64
        )

    def from_last_stage(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that the last stage holds, on every stage."""
        if x is None:
            x = torch.empty(*shape, dtype=dtype, device=self.device)
        if self.groups.pp_size > 1:
            dist.broadcast(x, src=self.groups.last_stage, group=self.groups.collection.pp)
        return x

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
        self, module: StageChunks, groups: RoleGroups, ds_config: dict[str, Any], **adam_options: Any
    ) -> None:
        for stage in module.stages:
            for parameter, placement in placements(stage):
                compat.tag_for_grad_norm(
                    parameter, placement.shard_dim is not None, groups.tp_rank, groups.pp_size > 1
                )
        self.optimizer = optimizer.adamw(module.parameters(), **adam_options)
        self.gradient_clipping = ds_config["gradient_clipping"]
        self.clips_itself = groups.layout.zero_stage == 0 and not ds_config["bf16"]["enabled"]
        if self.clips_itself:
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        with contextlib.ExitStack() as stack:
            if groups.layout.zero_stage == 0 and not self.clips_itself:
                stack.enter_context(compat.no_first_step(self.optimizer))
            engine = _initialize(module, groups, ds_config, optimizer=self.optimizer)
        super().__init__(module, groups, engine)

    def logits(self, output: Tensor) -> Tensor:
        """The network ends with its head."""
        return output

    def accumulate(
        self, inputs: Sequence[NetworkInput], loss: Callable[[Tensor, int], Tensor]
    ) -> list[Tensor]:
        """Gradients of the sum of the micro-batches' losses, averaged over the data-parallel ranks.

        Args:
            loss: (raw logits (N, V), number of the micro-batch) -> scalar; called on the last stage.

        Returns:
            The losses on the last stage, an empty list elsewhere.
        """
        return self.pipeline.train(inputs, loss)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the accumulated gradient of each part of the network (`model.weights.part_of`), before clipping.

        Collective over the network's ranks. A parameter's gradient is whole for a moment.
        """
        compat.set_deepspeed_mpu(self.groups.mpu)
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self.device)
        for stage in self.stages:
            for parameter, placement in placements(stage):
                gradient = compat.whole_gradient(self.engine, parameter)
                # Of equal copies on tensor-parallel ranks one counts.
                if gradient is not None and (placement.shard_dim is not None or self.groups.tp_rank == 0):
                    squares[PARTS.index(part_of(placement.name))] += gradient.double().square().sum()
        dist.all_reduce(squares, group=self.groups.everyone)
        norms = (squares / self.groups.dp_size).sqrt().tolist()
        return {part: norm for part, norm in zip(PARTS, norms, strict=True) if norm > 0}

    def reset_optimizer(self) -> None:
        """Forget AdamW's running means, as if no update had been made."""
        optimizer.reset(self.optimizer, compat.master_tensors(self.engine))

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient's global norm before clipping."""
        compat.set_deepspeed_mpu(self.groups.mpu)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.clips_itself:
            grad_norm = compat.clip_and_norm(self.engine, self.gradient_clipping)
            self.engine.step()
            return grad_norm
        if self.groups.layout.zero_stage == 0:
            compat.tag_gradients_for_norm(self.engine.module)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


class Teacher(ModelEngine):
    """The frozen network that the student learns from.

    Its engine ends with the final hidden states. The head stands apart, whole on each tensor-parallel rank's shard:
    on the teacher's last stage to draw tokens, and where the student's loss is computed (`FrozenHead`).
    """

    def __init__(self, module: StageChunks, groups: RoleGroups, student_ds_config: dict[str, Any]) -> None:
        module.requires_grad_(False)
        ds_config = teacher_ds_config(student_ds_config, groups.layout.zero_stage)
        super().__init__(module, groups, _initialize(module, groups, ds_config))
        self.engine.eval()
        self.head: FrozenHead | None = None
        if groups.is_last_stage:
            dtype = self.stages[-1].config.params_dtype
            self.head = FrozenHead(self.architecture, groups.collection, dtype, self.device)

    def logits(self, output: Tensor) -> Tensor:
        """The head applied to final hidden states (N, H)."""
        assert self.head is not None, "asked for on the last stage"
        return self.head(output)

    def hidden_states(
        self, input_ids_BL: Tensor, noise_of: NoiseOfRows, positions_N: Tensor
    ) -> Tensor | None:
        """Final hidden states (N, H) of the selected positions on the last stage, None elsewhere."""
        return self.infer(input_ids_BL, noise_of, positions_N, lambda output, which: output)

    def load(self, tensors: WholeTensors) -> None:
        """Take weights from whole tensors; each rank keeps only its own part.

        Args:
            tensors: (canonical name, tensor) pairs; what this rank has no part of is passed over.
        """
        own = {
            placement.name: (parameter, placement)
            for stage in self.stages
            for parameter, placement in placements(stage)
        }
        for name, whole in tensors:
            if name in own:
                write_shard(*own[name], whole, self.groups)
            elif self.head is not None and name.startswith("head."):
                self.head.write(name, whole)
        compat.release_whole_parameters(self.engine)


def _initialize(module: StageChunks, groups: RoleGroups, ds_config: dict[str, Any], **options: Any) -> Any:
    is_partitioned = groups.layout.zero_stage == 3
    if is_partitioned and (groups.pp_size > 1 or not groups.covers_world):
        compat.compare_traces_among_replicas()
    with contextlib.ExitStack() as stack:
        if not groups.covers_world:
            stack.enter_context(compat.barriers_within(groups.everyone))
        engine, *_ = deepspeed.initialize(
            model=module, config=ds_config, mpu=groups.mpu, dist_init_required=False, **options
        )
    return engine


def teacher_ds_config(student_ds_config: dict[str, Any], zero_stage: int) -> dict[str, Any]:
    """The teacher's DeepSpeed configuration: the student's precision and ZeRO-3 settings, no optimizer.

    No parameter persists unpartitioned, so that `Teacher.load` need only write partitions.
    """
    zero = student_ds_config["zero_optimization"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": student_ds_config["train_micro_batch_size_per_gpu"],
        "zero_optimization": {"stage": 0},
    }
    if zero_stage == 3:
        kept = {key: zero[key] for key in zero if key.startswith("stage3_") or key == "offload_param"}
        # overlap_comm: parameters are gathered on a stream of the engine's own, not on the student's.
        config["zero_optimization"] = {
            **kept,
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": True,
        }
    if "bf16" in student_ds_config:
        config["bf16"] = student_ds_config["bf16"]
    return config
