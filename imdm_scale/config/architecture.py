"""The shape of one network, and the named sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the network's function and its parameters' shapes.

    The Megatron-core network (`imdm_scale.model`) and the plain torch one (`imdm_scale.hf`) are both built
    from it. By default the backbone is the plain pre-norm transformer to which MDLM's time-independent adaLN folds;
    with `norm` rmsnorm, `mlp` swiglu and no `bias` it is Llama's, which LLaDA has.
    """

    vocab_size: int
    """Number of token ids, the mask token included."""
    mask_token_id: int
    """The id that stands for a masked position."""
    length: int
    """Number of tokens in a block; the network itself accepts any length."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Number of attention heads; divides `hidden_size` into even parts."""
    noise_dim: int
    """Dimensions of the noise e that a masked position carries; 0 makes a plain masked diffusion model."""
    noise_kind: str = "uniform"
    """Law of e: `uniform` on [-scale, scale], or `normal` with standard deviation scale."""
    noise_scale: float = 1.0
    """Scale of the noise."""
    noise_fourier: int = 0
    """Number K of frequencies of the Fourier features (`imdm_scale.diffusion.fourier`) that the mask embedding reads
    beside the noise itself; above 0 needs a noise_dim of at least 2."""
    num_masks: int = 0
    """Number K of masks that the network tells apart (`imdm_scale.diffusion.finite_masks`); 0: infinitely many. A
    network of K masks has a noise_dim of 1."""
    dropout: float = 0.0
    """Probability of dropping an element of a residual branch in training."""
    qk_norm: bool = False
    """Whether queries and keys pass a norm per head before the rotary embedding."""
    attention_softcap: float = 0.0
    """c > 0 turns attention scores into c * tanh(scores / c); 0 leaves them."""
    rope_base: float = 10000.0
    """Base of the rotary embedding's frequencies."""
    norm: str = "layernorm"
    """`layernorm`, or `rmsnorm` (arXiv 1910.07467), which subtracts no mean and never has a bias."""
    layer_norm_eps: float = 1e-5
    """Added to the variance (of RMSNorm: to the mean square) in every norm."""
    mlp: str = "gelu"
    """`gelu`: W2 gelu_tanh(W1 x); `swiglu` (arXiv 2002.05202): W2 (silu(Wg x) * Wu x), Wg and Wu as the two halves of
    one tensor."""
    mlp_size: int = 0
    """Width of the MLP's hidden layer; 0 stands for four times `hidden_size`, and becomes it."""
    bias: bool = True
    """Whether LayerNorms, MLPs and head have biases. Attention never has any, the mask embedding always its own."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of the linear layers."""
    sampler: str = "ancestral"
    """How the network was trained to be sampled, one of `imdm_scale.diffusion.sampler.SAMPLERS`."""

    def __post_init__(self) -> None:
        if self.mlp_size == 0:
            object.__setattr__(self, "mlp_size", 4 * self.hidden_size)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def norm_has_bias(self) -> bool:
        """Whether a norm has a bias beside its weight."""
        return self.bias and self.norm == "layernorm"

    @property
    def mlp_inputs(self) -> int:
        """Rows of the MLP's first tensor: of SwiGLU the gate's and the value's."""
        return (2 if self.mlp == "swiglu" else 1) * self.mlp_size

    @property
    def mask_embedding_size(self) -> int:
        """Width of the mask embedding's hidden layer."""
        return 4 * self.hidden_size

    @property
    def num_noise_features(self) -> int:
        """Number of Fourier features of the noise: a sine and a cosine of two coordinates at each frequency."""
        return 4 * self.noise_fourier

    def num_parameters(self) -> int:
        """Exact number of trainable parameters of the unpadded network."""
        d, v, inner = self.hidden_size, self.vocab_size, self.mask_embedding_size
        of_norm = 2 if self.norm_has_bias else 1
        mlp = self.mlp_inputs * d + d * self.mlp_size + (self.mlp_inputs + d if self.bias else 0)
        block = 2 * of_norm * d + 4 * d * d + mlp + (2 * of_norm * self.head_dim if self.qk_norm else 0)
        noise_width = self.noise_dim + self.num_noise_features
        mask_embedding = noise_width * inner + inner + inner * d if self.noise_dim else 0
        if self.num_masks:
            mask_embedding = self.num_masks * d
        head = v * d + (v if self.bias else 0)
        return v * d + mask_embedding + self.num_layers * block + of_norm * d + head


SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "noise_dim": 64},
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "noise_dim": 2048},
    "large": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16, "noise_dim": 2048},
    "1b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "noise_dim": 2048},
    "3b": {"hidden_size": 3072, "num_layers": 28, "num_heads": 24, "noise_dim": 2048},
    "7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "noise_dim": 2048},
    "70b": {"hidden_size": 8192, "num_layers": 80, "num_heads": 64, "noise_dim": 2048},
}
"""Shapes of the named sizes. Every head count is divisible by 2, 4 and 8 where the literature's shape allows."""


def size_named(name: str) -> dict[str, int]:
    """Shape of the size called `name`.

    Raises:
        UserError: no size has that name.
    """
    if name not in SIZES:
        raise UserError(f"model.size is {name!r}, which is no known size; choose one of {', '.join(SIZES)}.")
    return dict(SIZES[name])


def architecture_of(config: Config, vocab_size: int, mask_token_id: int) -> Architecture:
    """The network that `config.model` describes, over a vocabulary of `vocab_size` ids.

    Raises:
        UserError: no size has the name `model.size`.
    """
    model = config.model
    shape: dict[str, Any] = {**size_named(model.size)}
    for name in shape:
        given = getattr(model, name)
        if given is not None:
            shape[name] = given
    if model.num_masks:
        shape["noise_dim"] = 1
    return Architecture(
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        length=model.length,
        noise_kind=model.noise_kind,
        noise_scale=model.noise_scale,
        noise_fourier=model.noise_fourier,
        num_masks=model.num_masks,
        sampler=_sampler_of(config),
        dropout=model.dropout,
        qk_norm=model.qk_norm,
        attention_softcap=model.attention_softcap,
        rope_base=model.rope_base,
        norm=model.norm,
        layer_norm_eps=model.norm_eps,
        mlp=model.mlp,
        mlp_size=model.mlp_size or 0,
        bias=model.bias,
        **shape,
    )


def _sampler_of(config: Config) -> str:
    """The sampler for which the student is trained."""
    if config.method.name != "coupled":
        return "ancestral"
    return "coupled_argmax" if config.method.student_draws == "argmax" else "coupled"
