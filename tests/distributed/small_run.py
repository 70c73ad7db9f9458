"""One small training run, described once and done twice: by a single plain torch process, and by the engines.

Shapes: B batch, L positions, N masked positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from imdm_scale.config.architecture import Architecture
from imdm_scale.config.load import build_config, parse_override
from imdm_scale.config.tree import Config
from imdm_scale.data.pairs import Pairs, pack_pairs
from imdm_scale.data.stream import ArrayCorpus, TokenStream
from imdm_scale.diffusion.coupling import Coordinates, progressive_labels, rollout, trajectory_labels
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.targets import two_substep_targets
from imdm_scale.distill.batch_plan import BatchPlan, Visited
from imdm_scale.distill.micro_batch import MicroBatch
from imdm_scale.distill.pair_generation import noisy_states
from imdm_scale.distill.states import CorruptedData, StateSource
from imdm_scale.distill.stored_pairs import StoredPairs
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.tiny import plain_network, tiny, weights_of

Weights = dict[str, np.ndarray]

PAIRS_SEED = 9
SETTINGS = (
    "method.initial_steps=8",
    "method.steps_per_round=7",
    "method.teacher_temperature=0.5",  # so that the student has much to learn, beside which rounding is small
    f"model.length={tiny().length}",
    f"model.hidden_size={tiny().hidden_size}",
    f"model.num_layers={tiny().num_layers}",
    f"model.num_heads={tiny().num_heads}",
    "model.dropout=0",
    "train.max_steps=20",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.learning_rate=1e-3",
    "train.warmup_steps=3",
    "train.weight_decay=0.1",
    "train.gradient_clipping=0.1",
    "train.adam_eps=3e-4",  # as large as the gradients, whose rounding the update would otherwise magnify
    "train.ema_decay=0.3",
    "train.precision=fp32",
    "log.diagnose_every=0",
)


@dataclass
class Outcome:
    """What a run left; the same for every way of doing it."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)
    """The EMA."""
    transport_bytes: list[int] = field(default_factory=list)
    """Bytes from other ranks' teachers."""


def small_config(method: str = "pretrain", *settings: str, **train: Any) -> Config:
    """Twenty updates of eight samples, clipped hard; for im_sdtt in rounds of seven updates, under three teachers.

    Args:
        settings: `key=value` words.
        train: settings under `train`.
    """
    config = build_config([parse_override(word) for word in (f"method.name={method}", *SETTINGS, *settings)])
    return replace(config, train=replace(config.train, **train))


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed JSON with buckets small enough that there are several; some parameters persist whole, some do not."""
    return {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000,
            "stage3_param_persistence_threshold": 40,
        }
    }


def small_architecture(config: Config) -> Architecture:
    """The network of a small run."""
    model = config.model
    assert model.num_layers is not None
    return tiny(
        num_layers=model.num_layers,
        dropout=model.dropout,
        qk_norm=model.qk_norm,
        noise_fourier=model.noise_fourier,
        num_masks=model.num_masks,
        rope_base=model.rope_base,
        norm=model.norm,
        mlp=model.mlp,
        mlp_size=model.mlp_size or 0,
        bias=model.bias,
        **({"noise_dim": 1} if model.num_masks else {}),
    )


def small_blocks() -> np.ndarray:
    """A corpus of random tokens, (20, L)."""
    architecture = tiny()
    shape = (20, architecture.length)
    return np.random.default_rng(0).integers(0, architecture.mask_token_id, shape, dtype=np.uint16)


def small_pairs() -> np.ndarray:
    """As many random pairs as rows, (20, W); a teacher would lead elsewhere, but the loss does not know."""
    numbers = torch.arange(100, 120)
    x_0_BL = torch.from_numpy(small_blocks().astype(np.int64))
    states = noisy_states(PAIRS_SEED, numbers, x_0_BL, 0.2, tiny().mask_token_id)
    rows = pack_pairs(Pairs(states.x_t_BL.numpy(), x_0_BL.numpy(), states.t_B.numpy(), numbers.numpy()))
    return rows.astype(np.uint16)


def small_stream(config: Config) -> TokenStream:
    """What a small run reads."""
    rows = small_pairs() if config.method.name == "im_redi" else small_blocks()
    return TokenStream(ArrayCorpus(rows), config.seed)


def small_states(config: Config) -> StateSource:
    """What becomes of it."""
    if config.method.name == "im_redi":
        return StoredPairs(small_architecture(config), PAIRS_SEED, config.method.fresh_noise)
    return CorruptedData(small_architecture(config), coupled=config.method.name == "coupled")


def small_plan(config: Config) -> BatchPlan:
    """The corpus, a global batch at a time."""
    batch_size = config.train.global_batch_size
    return BatchPlan(
        stream=small_stream(config),
        states=small_states(config),
        seed=config.seed,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        dp_rank=0,
        dp_size=1,
        sampling_eps=config.method.sampling_eps,
    )


def to_numpy(weights: dict[str, Tensor]) -> Weights:
    """The weights as arrays, which travel between processes as copies."""
    return {name: weight.float().numpy().copy() for name, weight in weights.items()}


def plain_run(config: Config) -> Outcome:
    """The run by one process, the global batch in one piece, torch's own AdamW, clipping and autograd."""
    student = plain_network(small_architecture(config))
    teacher = copy.deepcopy(student).eval()
    train = config.train
    plan = small_plan(config)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        betas=(train.beta1, train.beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )
    average = weights_of(student)
    outcome = Outcome()
    for step in range(train.max_steps):
        round_index, place = divmod(step, config.method.steps_per_round)
        has_rounds = config.method.name == "im_sdtt" or config.method.target != "trajectory"
        if has_rounds and place == 0:
            fresh = average if config.method.refresh_from == "ema" else weights_of(student)
            teacher.load_state_dict(fresh)
            if config.method.reset_optimizer:
                optimizer.state.clear()
        if config.method.states != "data":
            network = teacher if config.method.states == "teacher" else student
            plan.visited = _visited(config, network, plan.micro_batch(step, 0))
        batch = plan.micro_batch(step, 0)
        with counter_based_dropout(batch, student.config.num_layers):
            if not config.method.has_teacher:
                loss = _nelbo(student, batch)
            elif config.method.name == "coupled":
                labels_N = _coupled_labels(
                    config, teacher, batch, 2**round_index / config.method.initial_steps
                )
                log_p_NV = _log_probabilities(
                    student, batch.x_t_BL, batch.mask_noise(tiny(), torch.device("cpu")), batch.positions_N
                )
                loss = torch.nn.functional.nll_loss(log_p_NV, labels_N)
            else:
                dt = 2**round_index / config.method.initial_steps
                temperature = config.method.teacher_temperature
                loss = _kl_to_two_substeps(student, teacher, batch, dt, temperature)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * min(1, (step + 1) / train.warmup_steps)
        optimizer.step()
        decay = min(train.ema_decay, (2 + step) / (11 + step))
        for name, weight in weights_of(student).items():
            average[name] = decay * average[name] + (1 - decay) * weight
        outcome.losses.append(loss.item())
        outcome.grad_norms.append(norm.item())
    outcome.weights, outcome.average = to_numpy(weights_of(student)), to_numpy(average)
    return outcome


@contextlib.contextmanager
def counter_based_dropout(batch: MicroBatch, num_layers: int) -> Iterator[None]:
    """torch's dropout has, inside the block, the masks that the engines' networks have in this update."""
    num_sites = 2 * num_layers
    sites = itertools.count()

    def dropout(x_BLH: Tensor, probability: float, training: bool) -> Tensor:
        if not training or probability == 0:
            return x_BLH
        _, length, width = x_BLH.shape
        draw = batch.step * num_sites + next(sites)
        u_BLH = uniform(batch.seed, batch.sample_ids_B, Purpose.DROPOUT, draw, length, width)
        return x_BLH * (u_BLH >= probability) / (1 - probability)

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield


def _log_probabilities(
    network: ImdmForMaskedLM,
    x_BL: Tensor,
    noise_BLD: Tensor,
    positions_N: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    noise_BLD = noise_BLD[..., : network.config.noise_dim]  # counter-based: the rest is not drawn otherwise
    logits_NV = network(x_BL, mask_noise=noise_BLD).logits.flatten(0, 1)[positions_N] / temperature
    mask = torch.arange(logits_NV.size(-1)) == network.config.mask_token_id
    return logits_NV.masked_fill(mask, -1e6).log_softmax(-1)


def _nelbo(network: ImdmForMaskedLM, batch: MicroBatch) -> Tensor:
    log_p_NV = _log_probabilities(
        network, batch.x_t_BL, batch.mask_noise(tiny(), torch.device("cpu")), batch.positions_N
    )
    picked_N = log_p_NV.gather(-1, batch.labels_N[:, None])[:, 0]
    return (-picked_N / batch.t_N.float()).sum() / batch.x_0_BL.numel()


def _drawn(
    network: ImdmForMaskedLM, batch: MicroBatch, temperature: float, greedy: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a network draws at positions of a batch in some state, by float64 cumulative sums."""
    noise_BLD = batch.mask_noise(tiny(), torch.device("cpu"))

    @torch.no_grad()
    def tokens(x_BL: Tensor, positions_N: Tensor, u_N: Tensor) -> Tensor:
        was_training = network.training
        log_p_NV = _log_probabilities(network.eval(), x_BL, noise_BLD, positions_N, temperature)
        network.train(was_training)
        if greedy:
            return log_p_NV.argmax(-1)
        return (log_p_NV.double().softmax(-1).cumsum(-1) <= u_N[:, None]).sum(-1)

    return tokens


def _coupled_labels(config: Config, teacher: ImdmForMaskedLM, batch: MicroBatch, dt: float) -> Tensor:
    """The teacher's tokens at the masked positions of a batch."""
    method, mask_id = config.method, tiny().mask_token_id
    tokens = _drawn(teacher, batch, method.teacher_temperature, _writes_greedily(config, batch))
    what = tokens, batch.x_t_BL, batch.coordinates(tiny()), batch.t_B
    long_N = trajectory_labels(*what, method.trajectory_steps, mask_id=mask_id, grid=method.trajectory_grid)
    short_N = progressive_labels(*what, dt, mask_id=mask_id)
    share = {"trajectory": 1.0, "progressive": 0.0, "mixture": method.trajectory_share}[method.target]
    u_B = uniform(batch.seed, batch.sample_ids_B, Purpose.TRAJECTORY, batch.step, 1)[:, 0, 0]
    return long_N.where((u_B < share)[batch.positions_N // batch.x_t_BL.shape[1]], short_N)


def _writes_greedily(config: Config, batch: MicroBatch) -> bool:
    """Whether the teacher is a past student that takes its likeliest tokens."""
    method = config.method
    in_later_round = method.target != "trajectory" and batch.step >= method.steps_per_round
    return method.student_draws == "argmax" and in_later_round


def _visited(config: Config, network: ImdmForMaskedLM, batch: MicroBatch) -> Visited:
    """The states that a network visits on its way to those of a batch."""
    method = config.method
    coupled = method.name == "coupled"
    by_teacher = coupled and method.states == "teacher"
    temperature = method.teacher_temperature if by_teacher else 1.0
    greedy = _writes_greedily(config, batch) if by_teacher else method.student_draws == "argmax"
    u_BL = uniform(
        batch.seed,
        batch.sample_ids_B,
        Purpose.VISIT_TOKEN,
        batch.step,
        batch.x_t_BL.shape[1],
        dtype=torch.float64,
    )[..., 0]
    start_BL = torch.full_like(batch.x_t_BL, tiny().mask_token_id)
    start_BL[:, 0] = 1
    ids_BL = rollout(
        _drawn(network, batch, temperature, coupled and greedy),
        start_BL,
        Coordinates(batch.coordinates(tiny()).u if coupled else u_BL, batch.reveal_BL),
        batch.t_B,
        method.visit_steps,
        mask_id=tiny().mask_token_id,
    )
    share = method.visit_share if method.states == "mix" else 1.0
    chosen_B = uniform(batch.seed, batch.sample_ids_B, Purpose.VISIT, batch.step, 1)[:, 0, 0] < share
    return Visited(batch.step, ids_BL, chosen_B)


def _kl_to_two_substeps(
    student: ImdmForMaskedLM, teacher: ImdmForMaskedLM, batch: MicroBatch, dt: float, temperature: float
) -> Tensor:
    noise_BLD = batch.mask_noise(tiny(), torch.device("cpu"))
    log_q_NV = two_substep_targets(
        lambda x_BL, e_BLD, positions_N: _log_probabilities(teacher, x_BL, e_BLD, positions_N, temperature),
        batch.x_t_BL,
        noise_BLD,
        batch.t_B,
        dt,
        mask_id=student.config.mask_token_id,
        seed=batch.seed,
        sample_ids_B=batch.sample_ids_B,
        step=batch.step,
    ).log_softmax(-1)
    log_p_NV = _log_probabilities(student, batch.x_t_BL, noise_BLD, batch.positions_N)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum() / len(log_p_NV)
