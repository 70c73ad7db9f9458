"""The transformers configuration of an IMDM. This file travels with exported checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..diffusion.sampler import SAMPLERS


class ImdmConfig(PreTrainedConfig):
    """Configuration of `ImdmForMaskedLM`.

    The fields carry the names of `imdm_scale.config.architecture.Architecture`, which documents them; the
    names that transformers uses elsewhere (`num_hidden_layers`, ...) are aliases.

    Raises:
        ValueError: the values do not describe a network.
    """

    model_type = "imdm"
    attribute_map = {  # noqa: RUF012 (transformers' own declaration)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "length",
    }

    vocab_size: int = 50258
    mask_token_id: int = 50257
    length: int = 1024
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    noise_dim: int = 2048
    noise_kind: str = "uniform"
    noise_scale: float = 1.0
    noise_fourier: int = 0
    num_masks: int = 0
    dropout: float = 0.0
    qk_norm: bool = False
    attention_softcap: float = 0.0
    rope_base: float = 10000.0
    norm: str = "layernorm"
    layer_norm_eps: float = 1e-5
    mlp: str = "gelu"
    mlp_size: int = 0
    bias: bool = True
    initializer_range: float = 0.02

    sampler: str = "ancestral"
    vocabulary_order: str = "identity"
    """Order of the tokens in which an inverse CDF draws them: identity is that of ids; the ranks of any other are
    stored with the weights."""

    tokenizer_fingerprint: str | None = None
    """Hash of the tokenizer's ids, so that a wrong tokenizer is noticed; None where it is unknown."""
    bos_token_id: int | None = None
    """Where it is set, every block begins with it and so does every generated text without a prefix."""
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mlp_size == 0:  # as in every file that was written before there was a choice
            self.mlp_size = 4 * self.hidden_size
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size} into even parts"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside [0, {self.vocab_size})")
        if self.noise_kind not in ("uniform", "normal"):
            raise ValueError(f"noise_kind {self.noise_kind!r} is neither 'uniform' nor 'normal'")
        for name, kinds in (("norm", ("layernorm", "rmsnorm")), ("mlp", ("gelu", "swiglu"))):
            if (kind := getattr(self, name)) not in kinds:
                raise ValueError(f"{name} {kind!r} is neither {kinds[0]!r} nor {kinds[1]!r}")
        if self.noise_fourier and self.noise_dim < 2:
            raise ValueError(
                f"noise_fourier {self.noise_fourier} needs a noise_dim of at least 2, not {self.noise_dim}"
            )
        if self.num_masks and self.noise_dim != 1:
            raise ValueError(f"num_masks {self.num_masks} needs a noise_dim of 1, not {self.noise_dim}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is none of {', '.join(SAMPLERS)}")
        if self.sampler != "ancestral" and self.noise_dim < 2:
            raise ValueError(f"sampler {self.sampler} needs a noise_dim of at least 2, not {self.noise_dim}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is True, but the head has a weight of its own")
