"""The one typed tree of settings.

The defaults are those of the literature's OpenWebText runs of IM-SDTT (IMDM, arXiv 2605.10518, and its
public scripts); a recipe changes them. The string under a field is what --help shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class MethodConfig:
    """How the student learns."""

    name: Literal["im_sdtt", "coupled", "im_redi", "pretrain"] = "im_sdtt"
    """im_sdtt distils a teacher into ever fewer steps; coupled learns the teacher's tokens as a function of the masks'
    noise; im_redi fits pairs that a teacher made (tools/generate_pairs.py), pretrain the data."""
    divergence: Literal["kl_backward", "kl_forward", "jsd", "tvd", "mse"] = "kl_backward"
    """Distance of the student's S from the teacher's T; kl_backward is KL(S||T), kl_forward KL(T||S)."""
    initial_steps: int = 1024
    """Steps that the teacher takes from pure mask to text in round 0; each round halves them."""
    steps_per_round: int = 10000
    """Updates in a round; at its end the student becomes the teacher."""
    min_steps: int = 2
    """No new round begins if its teacher would take fewer steps; with 2 the last student takes one step."""
    refresh_from: Literal["raw", "ema"] = "raw"
    """Which of the student's weights become the next teacher: those just trained or their average."""
    target: Literal["trajectory", "progressive", "mixture"] = "trajectory"
    """coupled: a whole trajectory of the teacher, or two small steps in rounds as in im_sdtt, or each for some
    samples."""
    trajectory_steps: int = 16
    """coupled: steps of the teacher's trajectory."""
    trajectory_grid: Literal["time", "order", "position"] = "time"
    """coupled: what the steps divide evenly: the time, as ancestral sampling does, or the masked positions, in the
    order of their times or from left to right; they are revealed one by one if there are as many steps."""
    trajectory_share: float = 0.5
    """coupled, mixture: share of the samples that are labelled by a trajectory."""
    student_draws: Literal["inverse_cdf", "argmax"] = "inverse_cdf"
    """coupled: how the student writes: by the noise's uniforms, or its likeliest tokens (all chance is in the
    noise)."""
    vocabulary_order: Literal["identity", "frequency", "embedding"] = "identity"
    """coupled: order in which a uniform runs through the tokens: of ids, frequent ones first, or by the first principal
    component of the teacher's token embedding, where similar tokens are neighbours."""
    reset_optimizer: bool = False
    """Whether AdamW forgets its running means when the student becomes the teacher."""
    states: Literal["data", "teacher", "student", "mix"] = "data"
    """Whose texts are masked for the student: those of the corpus, of the teacher, or its own (on-policy: the teacher
    labels what the student visits); mix takes the student's own for a share of the samples."""
    visit_steps: int = 4
    """Sampling steps in which teacher or student goes from pure mask to a sample's time; not used with states data."""
    visit_share: float = 0.5
    """mix: share of the samples whose states are the student's."""
    fresh_noise: bool = False
    """im_redi: whether each update draws the noise of a pair's state anew instead of taking the pair's own."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits in every round; below 1 the student learns a sharper distribution."""
    sampling_eps: float = 1e-3
    """Smallest time t that training draws."""

    @property
    def has_teacher(self) -> bool:
        """Whether a frozen network runs beside the student."""
        return self.name not in ("pretrain", "im_redi")


@dataclass
class ModelConfig:
    """The network that is trained (for im_sdtt also its teacher's shape)."""

    size: str = "small"
    """Named size: tiny, small, large, 1b, 3b, 7b or 70b."""
    length: int = 1024
    """Tokens in a block of text."""
    dropout: float = 0.1
    """Probability of dropping an element of a residual branch in training."""
    noise_dim: int | None = None
    """Dimensions of a mask's noise; null takes the size's own, 0 makes a plain masked diffusion model."""
    noise_kind: Literal["uniform", "normal"] = "uniform"
    """Law of the noise: uniform on [-noise_scale, noise_scale], or normal with that standard deviation."""
    noise_scale: float = 1.0
    """Scale of the noise."""
    noise_fourier: int = 0
    """Frequencies at which the network also reads the noise's first two dimensions; 16 lets it read coupled noise."""
    num_masks: int = 0
    """Number of masks, each with an embedding of its own, in the place of noise; 0: infinitely many, that is noise."""
    qk_norm: bool = False
    """Whether queries and keys pass a LayerNorm per head before the rotary embedding."""
    attention_softcap: float = 0.0
    """c > 0 turns attention scores into c * tanh(scores / c); 0 leaves them."""
    hidden_size: int | None = None
    """Width of the residual stream; null takes the size's own."""
    num_layers: int | None = None
    """Number of transformer blocks; null takes the size's own."""
    num_heads: int | None = None
    """Number of attention heads; null takes the size's own."""


@dataclass
class DataConfig:
    """The text."""

    path: str | list[str] | None = None
    """Prepared data (a folder, or a URL: s3://bucket/owt), or text; a list mixes; null takes the packaged books. For
    im_redi folders of pairs."""
    weights: list[float] | None = None
    """Shares of the corpora that data.path lists, in any unit; null mixes them by size."""
    workers: int = 0
    """Processes in which a rank that reads reads ahead; with 0 it reads by itself, which costs little from a disk."""
    continue_from: str | None = None
    """Folder of a checkpoint or an exported student whose place in the data this run goes on from; null begins anew."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What a missing or corrupted shard does: stop ends the run; skip lets its neighbours stand in and counts it."""
    cache_dir: str | None = None
    """Folder on each node for shards behind URLs; null takes ~/.cache/imdm_scale (or $XDG_CACHE_HOME/imdm_scale)."""
    cache_gib: float = 32.0
    """Largest size of that folder in GiB; it must hold two windows of shards."""
    attempts: int = 5
    """How often a shard is asked for, waiting 1, 2, 4, ... seconds in between, before it counts as missing."""
    timeout: float = 60.0
    """Seconds without a byte after which an attempt counts as failed."""


@dataclass
class TokenizerConfig:
    """How text becomes token ids."""

    path: str | None = None
    """A .model file or folder of a tokenizer; null takes the prepared data's own, for text the packaged one."""


@dataclass
class TeacherConfig:
    """The network that im_sdtt starts from."""

    path: str | None = None
    """Folder of a model (config.json and safetensors); null takes the packaged tiny teacher."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """colocated runs teacher and student on the same ranks; disaggregated gives each ranks of its own."""
    ranks: int | list[int] | None = None
    """disaggregated: the teacher's ranks, as a list or as a count of the last ones; null takes the last half."""
    zero_stage: int | None = None
    """ZeRO stage of the teacher, 0 (whole replicas) or 3; null takes 3 where the student has 3, else 0."""
    micro_batch_size: int | None = None
    """Blocks of text that the teacher computes at a time; null takes train.micro_batch_size."""
    prefetch: int = 1
    """Updates that the teacher works ahead of the student; 0 (colocated only) computes them in turn."""
    timeout: float = 600.0
    """disaggregated: seconds that one side waits for the other, which may be saving, before the run ends."""
    checksum: bool = False
    """Whether every message from teacher to student is verified; for debugging."""


@dataclass
class RoleParallelConfig:
    """How one network is split over ranks; what remains of the processes is data parallel."""

    tp: int = 1
    """Tensor parallel size: ranks that share each layer."""
    pp: int = 1
    """Pipeline parallel size: groups of layers on different ranks."""
    virtual_stages: int = 1
    """Groups of layers that each pipeline rank holds; above 1 stages are interleaved, so that ranks idle less."""
    sequence_parallel: bool = False
    """Whether the tensor parallel ranks also share the sequence between layers, which saves activations."""


@dataclass
class ParallelConfig:
    """How the networks are split over ranks."""

    student: RoleParallelConfig = field(default_factory=RoleParallelConfig)
    """The trained network."""
    teacher: RoleParallelConfig = field(default_factory=RoleParallelConfig)
    """The frozen network."""


@dataclass
class TrainConfig:
    """Batches, optimizer and precision."""

    max_steps: int = 70000
    """Updates in the whole run."""
    micro_batch_size: int = 16
    """Blocks of text that one rank passes through the network at a time."""
    global_batch_size: int = 128
    """Blocks of text in one update over all ranks; a multiple of micro_batch_size x data-parallel size."""
    save_every: int = 10000
    """Updates between two checkpoints."""
    learning_rate: float = 6e-5
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up, until max_steps."""
    warmup_steps: int = 500
    """Updates over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Where cosine and linear end, as a fraction of learning_rate."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's running mean."""
    beta2: float = 0.999
    """AdamW's decay of the squared gradient's running mean."""
    adam_eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    gradient_clipping: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    ema_decay: float = 0.9999
    """Decay of the weights' running average, warmed up as min(ema_decay, (1 + n) / (10 + n)) at update n."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the networks; the optimizer's copy of the weights is fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none; the attention's core (selective); whole layers (full)."""
    init_from: str | None = None
    """Folder of a model (config.json and safetensors) from which pretrain or im_redi starts; null starts afresh."""


@dataclass
class LogConfig:
    """What is reported while the run goes on."""

    every: int = 50
    """Updates between two reports to the terminal and to wandb; metrics.jsonl gets every update."""
    diagnose_every: int = 100
    """Updates between two diagnoses (loss by time and by order, accuracy, entropy, gradients by part, use of the
    noise); 0: none."""
    noise_draws: int = 64
    """Draws of the noise with which its use is measured; the measure cannot exceed their logarithm."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases: off, offline (files under run_dir, no account) or online."""
    wandb_project: str = "imdm_scale"
    """Project name in Weights & Biases."""


@dataclass
class EvaluateConfig:
    """The quality table at the end."""

    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Numbers of sampling steps in the table."""
    num_samples: int = 1024
    """Texts sampled for each number of steps."""
    batch_size: int = 32
    """Texts sampled at a time on one rank."""
    shown_samples: int = 3
    """Texts of teacher and student that are printed."""
    shown_steps: int = 4
    """Sampling steps of the printed texts."""
    temperature: float = 1.0
    """Sampling temperature; below 1 trades variety for likelihood."""
    seed: int = 42
    """Seed of the sampling."""
    max_tokens: int = 4_000_000
    """Tokens of real text, at most, to which the judge is fitted, and held-out ones on which all is measured."""
    at_end: bool = True
    """Whether training ends with the table."""


@dataclass
class Config:
    """Every setting of a run."""

    run_dir: str = "runs/imdm"
    """Folder for everything that the run writes."""
    seed: int = 1
    """Seed of every draw in training."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """How the student learns."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network that is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes token ids."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The network that im_sdtt starts from."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the networks are split over ranks."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batches, optimizer and precision."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is reported while the run goes on."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The quality table at the end."""
