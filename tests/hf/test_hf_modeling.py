"""The plain torch network: its function, its initialisation and its size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imdm_scale.config.architecture import SIZES, Architecture, size_named
from imdm_scale.hf.configuration_imdm import ImdmConfig
from imdm_scale.hf.export import architecture_from_config, config_from_architecture
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

PARAMETERS = {  # at 50,258 token ids, tiny at 4,097
    "tiny": 5_585_921,
    "small": 170_919_506,
    "large": 856_281_170,
    "1b": 1_447_875_666,
    "3b": 3_543_436_370,
    "7b": 6_956_082_258,
    "70b": 65_589_478_482,
}


def naive_logits(model: ImdmForMaskedLM, ids: Tensor, noise: Tensor, attend: Tensor) -> Tensor:
    """The network written from its formulas: einsum, rotation by complex numbers, all in float64."""
    config = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    noise = noise.double()

    def bias(name: str) -> Tensor | float:
        assert (name + ".bias" in w) == (config.bias and not (config.norm == "rmsnorm" and "norm" in name))
        return w.get(name + ".bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x if config.norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + config.layer_norm_eps).sqrt() * w[name + ".weight"] + bias(name)

    def rotate(x: Tensor) -> Tensor:  # (b, l, a, k)
        half = x.shape[-1] // 2
        frequency = torch.tensor([config.rope_base ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = torch.einsum("l,i->li", torch.arange(x.shape[1], dtype=torch.float64), frequency)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None, :]
        return torch.cat((turned.real, turned.imag), -1)

    def gelu_tanh(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["token_embedding.weight"][ids]
    if config.num_masks:
        which = ((noise[..., 0] + 1) / 2 * config.num_masks).floor().long()
        x = x + (ids == config.mask_token_id)[..., None] * w["mask_embedding.table.weight"][which]
    elif config.noise_dim:
        inner = torch.einsum("bld,hd->blh", noise, w["mask_embedding.dense_in.weight"])
        inner = inner + w["mask_embedding.dense_in.bias"]
        if config.noise_fourier:
            u, tau = (((noise[..., i] + 1) / 2)[..., None] for i in (0, 1))
            angle = 2 * math.pi * torch.arange(1, config.noise_fourier + 1)
            features = [f(angle * uniform) for uniform in (u, tau) for f in (torch.sin, torch.cos)]
            inner = inner + torch.cat(features, -1) @ w["mask_embedding.dense_fourier.weight"].T
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        g = torch.einsum("blh,oh->blo", inner, w["mask_embedding.dense_out.weight"])
        x = x + (ids == config.mask_token_id)[..., None] * g
    batch, length, hidden = x.shape
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        h = norm(x, block + "norm1")
        q, k, v = (
            torch.einsum("blh,oh->blo", h, part).view(batch, length, config.num_heads, -1)
            for part in w[block + "attention.qkv.weight"].split(hidden)
        )
        if config.qk_norm:
            q, k = norm(q, block + "attention.q_norm"), norm(k, block + "attention.k_norm")
        scores = torch.einsum("blak,bmak->balm", rotate(q), rotate(k)) / math.sqrt(q.shape[-1])
        if config.attention_softcap:
            scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
        weights = torch.exp(scores) * attend[:, None, None, :]
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.einsum("balm,bmak->blak", weights, v).reshape(batch, length, hidden)
        x = x + torch.einsum("blh,oh->blo", y, w[block + "attention.out.weight"])
        h = norm(x, block + "norm2")
        h = torch.einsum("blh,oh->blo", h, w[block + "mlp.dense_in.weight"]) + bias(block + "mlp.dense_in")
        if config.mlp == "swiglu":
            gate, up = h.split(config.mlp_size, dim=-1)
            h = gate / (1 + torch.exp(-gate)) * up
        else:
            h = gelu_tanh(h)
        h = torch.einsum("blh,oh->blo", h, w[block + "mlp.dense_out.weight"])
        x = x + h + bias(block + "mlp.dense_out")
    return torch.einsum("blh,vh->blv", norm(x, "final_norm"), w["head.weight"]) + bias("head")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_dim": 0},
        {"noise_fourier": 4},
        {"num_masks": 5, "noise_dim": 1},
        {"qk_norm": True},
        {"attention_softcap": 0.7},
        {"qk_norm": True, "attention_softcap": 0.7, "rope_base": 100.0, "layer_norm_eps": 1e-2},
        {"norm": "rmsnorm", "qk_norm": True, "layer_norm_eps": 1e-2},
        {"mlp": "swiglu", "mlp_size": 56},
        {"bias": False, "mlp_size": 24},
        {"norm": "rmsnorm", "mlp": "swiglu", "mlp_size": 96, "bias": False, "rope_base": 5e5},
    ],
    ids=[
        "plain",
        "mdm",
        "fourier",
        "finite",
        "qk_norm",
        "softcap",
        "all",
        "rmsnorm",
        "swiglu",
        "no_biases",
        "llama",
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_logits_follow_the_formulas(network, ids_BL, changes, padded):
    model = network(**changes)
    noise = 2 * torch.rand(3, 12, model.config.noise_dim) - 1
    attend = torch.ones(3, 12, dtype=torch.long)
    if padded:
        attend[0, 7:] = 0
        attend[2, :3] = 0
    with torch.no_grad():
        logits = model(ids_BL, mask_noise=noise, attention_mask=attend if padded else None).logits
    expected = naive_logits(model, ids_BL, noise, attend)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


def test_positions_outside_the_attention_mask_have_no_influence(network, ids_BL):
    for softcap in (0.0, 2.0):
        model = network(attention_softcap=softcap, noise_dim=0)
        attend = torch.ones_like(ids_BL)
        attend[:, 8:] = 0
        changed = ids_BL.clone()
        changed[:, 8:] = (changed[:, 8:] + 1) % 30
        with torch.no_grad():
            before, after = (model(x, attention_mask=attend).logits for x in (ids_BL, changed))
            unmasked = model(changed).logits
        assert torch.equal(before[:, :8], after[:, :8])
        assert not torch.allclose(unmasked[:, :8], after[:, :8], atol=1e-3)


def test_fresh_imdm_is_the_mdm_bit_for_bit(network, ids_BL):
    model = network()
    fresh = ImdmForMaskedLM(model.config).mask_embedding
    assert fresh.dense_in.weight.abs().max() > 0
    model.mask_embedding = fresh
    mdm = network(noise_dim=0)
    mdm.load_state_dict(
        {name: t for name, t in model.state_dict().items() if not name.startswith("mask_emb")}
    )
    with torch.no_grad():
        assert torch.equal(model(ids_BL, mask_noise=torch.randn(3, 12, 6)).logits, mdm(ids_BL).logits)


def test_features_with_zero_weights_change_nothing_bit_for_bit(network, ids_BL):
    model = network(noise_fourier=4)
    without = network()
    without.load_state_dict({name: t for name, t in model.state_dict().items() if "fourier" not in name})
    noise = 2 * torch.rand(3, 12, 6) - 1
    with torch.no_grad():
        expected = without(ids_BL, mask_noise=noise).logits
        assert not torch.equal(model(ids_BL, mask_noise=noise).logits, expected)
        model.mask_embedding.dense_fourier.weight.zero_()
        assert torch.equal(model(ids_BL, mask_noise=noise).logits, expected)
    torch.manual_seed(0)
    assert ImdmForMaskedLM(model.config).mask_embedding.dense_fourier.weight.abs().max() == 0


def test_gradient_reaches_the_features_weights_once_dense_out_is_not_zero(network, ids_BL):
    model = network(noise_fourier=4)
    torch.nn.init.zeros_(model.mask_embedding.dense_fourier.weight)
    labels = torch.arange(36).view(3, 12) % 30
    model(ids_BL, mask_noise=2 * torch.rand(3, 12, 6) - 1, labels=labels).loss.backward()
    gradient = model.mask_embedding.dense_fourier.weight.grad
    assert gradient.shape == (128, 16) and bool((gradient.abs().amax(0) > 0).all())


def test_noise_is_read_at_masked_positions_only(network, ids_BL):
    model = network()
    noise = torch.randn(3, 12, 6)
    masked = (ids_BL == 30)[..., None]
    with torch.no_grad():
        base = model(ids_BL, mask_noise=noise).logits
        elsewhere = model(ids_BL, mask_noise=torch.where(masked, noise, 5.0)).logits
        there = model(ids_BL, mask_noise=torch.where(masked, -noise, noise)).logits
    assert torch.equal(base, elsewhere)
    assert not torch.allclose(base, there, atol=1e-3)


def test_absent_noise_is_drawn_by_the_configured_law(network):
    torch.manual_seed(0)
    uniform = network(noise_scale=3.0).draw_mask_noise(40, 100)
    assert uniform.shape == (40, 100, 6)
    assert -3 <= uniform.min() < -2.99 and 2.99 < uniform.max() <= 3
    assert uniform.var().item() == pytest.approx(3.0, rel=0.05)
    normal = network(noise_scale=3.0, noise_kind="normal").draw_mask_noise(40, 100)
    assert normal.std().item() == pytest.approx(3.0, rel=0.03)
    assert normal.abs().max() > 9


def test_absent_noise_is_drawn_afresh_at_every_call(network, ids_BL):
    model = network()
    with torch.no_grad():
        torch.manual_seed(5)
        first, second = model(ids_BL).logits, model(ids_BL).logits
        torch.manual_seed(5)
        again = model(ids_BL).logits
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, atol=1e-3)


def test_gradient_reaches_dense_in_only_once_dense_out_is_not_zero(network, ids_BL):
    model = network()
    labels = torch.arange(36).view(3, 12) % 30
    torch.nn.init.zeros_(model.mask_embedding.dense_out.weight)
    model(ids_BL, mask_noise=torch.randn(3, 12, 6), labels=labels).loss.backward()
    assert model.mask_embedding.dense_in.weight.grad.abs().max() == 0
    assert model.mask_embedding.dense_out.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.mask_embedding.dense_out.weight -= model.mask_embedding.dense_out.weight.grad
    model.zero_grad()
    model(ids_BL, mask_noise=torch.randn(3, 12, 6), labels=labels).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_loss_is_the_mean_cross_entropy_of_the_labelled_positions(network, ids_BL):
    model = network()
    noise = torch.randn(3, 12, 6)
    labels = torch.full((3, 12), -100)
    labels[0, 3], labels[2, 11] = 7, 0
    with torch.no_grad():
        output = model(ids_BL, mask_noise=noise, labels=labels)
    log_p = output.logits.log_softmax(-1)
    assert output.loss.item() == pytest.approx(-(log_p[0, 3, 7] + log_p[2, 11, 0]).item() / 2, rel=1e-6)
    assert model(ids_BL, mask_noise=noise).loss is None


def test_dropout_acts_in_training_only(network, ids_BL):
    model = network(dropout=0.5)
    noise = torch.randn(3, 12, 6)
    with torch.no_grad():
        evaluated = model(ids_BL, mask_noise=noise).logits
        assert torch.equal(evaluated, network(dropout=0.0)(ids_BL, mask_noise=noise).logits)
        model.train()
        first, second = (model(ids_BL, mask_noise=noise).logits for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first, evaluated, atol=1e-3)


def test_wrong_shape_of_noise_is_refused(network, ids_BL):
    with pytest.raises(ValueError, match=r"mask_noise has shape \(3, 12, 5\), expected \(3, 12, 6\)"):
        network()(ids_BL, mask_noise=torch.zeros(3, 12, 5))


def test_initialisation():
    torch.manual_seed(0)
    config = ImdmConfig(
        vocab_size=501,
        mask_token_id=500,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        noise_dim=32,
        qk_norm=True,
        initializer_range=0.05,
    )
    weights = dict(ImdmForMaskedLM(config).named_parameters())
    for name, weight in weights.items():
        if name.endswith("bias") or name in ("mask_embedding.dense_out.weight", "head.weight"):
            assert weight.abs().max() == 0, name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name == "mask_embedding.dense_in.weight":
            assert 0.039 < weight.abs().max() <= 0.04
            assert weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03)  # of a normal cut at 2 std
        elif name == "token_embedding.weight":
            assert 0.124 < weight.abs().max() <= 1 / 8
            assert weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name
            assert weight.abs().max() > 0.15, name


def test_fresh_finite_masks_are_the_plain_model(network, ids_BL):
    """All embeddings start at zero."""
    model = network(num_masks=4, noise_dim=1)
    fresh = ImdmForMaskedLM(model.config)
    assert fresh.mask_embedding.table.weight.abs().max() == 0
    model.mask_embedding = fresh.mask_embedding
    first, second = (model(ids_BL, mask_noise=2 * torch.rand(3, 12, 1) - 1).logits for _ in range(2))
    assert torch.equal(first, second)
    model.mask_embedding = None
    assert torch.equal(first, model(ids_BL).logits)


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize(("qk_norm", "noise_fourier"), [(False, 0), (True, 0), (False, 16)])
def test_parameter_counts_of_the_named_sizes(size, qk_norm, noise_fourier):
    vocab_size = 4097 if size == "tiny" else 50258
    shape = size_named(size)
    architecture = Architecture(
        vocab_size=vocab_size,
        mask_token_id=vocab_size - 1,
        length=1024,
        qk_norm=qk_norm,
        noise_fourier=noise_fourier,
        **shape,
    )
    with torch.device("meta"):
        model = ImdmForMaskedLM(config_from_architecture(architecture))
    count = sum(parameter.numel() for parameter in model.parameters())
    per_head = 4 * shape["hidden_size"] // shape["num_heads"] * shape["num_layers"] if qk_norm else 0
    of_features = 4 * noise_fourier * 4 * shape["hidden_size"]
    assert count == architecture.num_parameters() == PARAMETERS[size] + per_head + of_features
    assert not list(model.buffers())


def test_configuration_and_architecture_are_one_to_one():
    architecture = Architecture(
        vocab_size=11,
        mask_token_id=3,
        length=7,
        hidden_size=24,
        num_layers=5,
        num_heads=3,
        noise_dim=2,
        noise_kind="normal",
        noise_scale=2.0,
        noise_fourier=6,
        num_masks=0,
        dropout=0.1,
        qk_norm=True,
        attention_softcap=50.0,
        rope_base=500.0,
        norm="rmsnorm",
        layer_norm_eps=1e-6,
        mlp="swiglu",
        mlp_size=40,
        bias=False,
        initializer_range=0.01,
        sampler="coupled_argmax",
    )
    config = config_from_architecture(architecture, tokenizer_fingerprint="abc", bos_token_id=1)
    assert architecture_from_config(config) == architecture
    assert (config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings) == (5, 3, 7)
    assert (config.tokenizer_fingerprint, config.bos_token_id, config.eos_token_id) == ("abc", 1, None)
    assert architecture_from_config(ImdmConfig.from_dict(config.to_dict())) == architecture


def test_a_file_from_before_there_was_a_choice_is_of_mdlms_kind():
    description = ImdmConfig(hidden_size=24, num_heads=3).to_dict()
    for name in ("norm", "mlp", "mlp_size", "bias"):
        del description[name]
    architecture = architecture_from_config(ImdmConfig.from_dict(description))
    assert (architecture.norm, architecture.mlp, architecture.bias) == ("layernorm", "gelu", True)
    assert architecture.mlp_size == 96
    assert architecture == replace(architecture, mlp_size=0)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms_are_computed_in_float32(network, norm):
    """Of bfloat16 input they differ from float64's by the rounding of the result only."""
    layer = network(norm=norm).final_norm.bfloat16()
    x = 5 + torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = layer.double()(x.double())
    torch.testing.assert_close(layer.bfloat16()(x).double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 5},
        {"num_heads": 32},
        {"mask_token_id": 31},
        {"noise_kind": "cauchy"},
        {"norm": "batchnorm"},
        {"mlp": "relu"},
        {"noise_fourier": 2, "noise_dim": 1},
        {"num_masks": 4, "noise_dim": 2},
        {"sampler": "beam"},
        {"sampler": "coupled", "noise_dim": 1},
    ],
)
def test_impossible_configuration_is_refused(network, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        network(**changes)
