"""Import of MDLM checkpoints, against activations recorded from kuleshov-group/mdlm, models/dit.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from imdm_scale.checkpoint.mdlm import fold_mdlm
from imdm_scale.errors import UserError
from imdm_scale.hf.export import config_from_architecture
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

ORACLE = Path(__file__).resolve().parent.parent / "data" / "mdlm_dit.pt"


@pytest.fixture(scope="module")
def oracle() -> dict:
    """Weights, inputs and outputs of a small MDLM network (V = 97, H = 64, two blocks), adaLN not zero."""
    return torch.load(ORACLE, weights_only=True)


def folded_model(state_dict: dict, **settings: object) -> ImdmForMaskedLM:
    architecture, tensors = fold_mdlm(state_dict, **settings)
    model = ImdmForMaskedLM(config_from_architecture(architecture))
    model.load_state_dict(tensors)
    return model.eval()


def test_folded_network_gives_the_recorded_logits_and_activations(oracle):
    model = folded_model(oracle["state_dict"], length=32)
    blocks = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, output, i=i: blocks.update({f"block{i}": output}))
    with torch.no_grad():
        logits = model(oracle["indices"]).logits
    assert (oracle["output"] - oracle["output_sigma0"]).abs().max() > 0.1  # adaLN does depend on sigma
    torch.testing.assert_close(logits, oracle["output_sigma0"], rtol=0, atol=1e-5)
    for name, expected in oracle["block_outputs_sigma0"].items():
        torch.testing.assert_close(blocks[name], expected, rtol=0, atol=1e-5)


def test_architecture_is_read_from_the_tensors(oracle):
    architecture, tensors = fold_mdlm(oracle["state_dict"], length=32)
    assert (architecture.vocab_size, architecture.mask_token_id, architecture.length) == (97, 96, 32)
    assert (architecture.hidden_size, architecture.num_layers, architecture.num_heads) == (64, 2, 4)
    assert (architecture.noise_dim, architecture.qk_norm, architecture.attention_softcap) == (0, False, 0.0)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors.values()) == architecture.num_parameters()
    changed, _ = fold_mdlm(oracle["state_dict"], mask_token_id=5, attention_softcap=50.0)
    assert (changed.mask_token_id, changed.attention_softcap) == (5, 50.0)


def test_prefix_of_published_checkpoints_is_taken_off(oracle):
    plain = fold_mdlm(oracle["state_dict"])
    prefixed = fold_mdlm({"backbone." + name: tensor for name, tensor in oracle["state_dict"].items()})
    assert prefixed[0] == plain[0]
    assert all(torch.equal(prefixed[1][name], tensor) for name, tensor in plain[1].items())


def test_mask_embedding_and_qk_norm_of_an_imdm_are_taken(oracle):
    torch.manual_seed(0)
    extra = {
        "vocab_embed.imdm_mlp.0.weight": torch.randn(256, 5),
        "vocab_embed.imdm_mlp.0.bias": torch.randn(256),
        "vocab_embed.imdm_mlp.2.weight": torch.randn(64, 256),
    }
    for i in range(2):
        for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
            extra[f"blocks.{i}.{name}"] = torch.randn(16)
    model = folded_model(oracle["state_dict"] | extra)
    assert model.config.noise_dim == 5 and model.config.qk_norm
    noise = torch.rand(1, 3, 5)
    expected = F.linear(
        F.gelu(F.linear(noise, extra["vocab_embed.imdm_mlp.0.weight"], extra["vocab_embed.imdm_mlp.0.bias"])),
        extra["vocab_embed.imdm_mlp.2.weight"],
    )
    torch.testing.assert_close(model.mask_embedding(noise), expected)
    assert torch.equal(model.blocks[1].attention.k_norm.bias, extra["blocks.1.k_norm.bias"])
    assert torch.equal(model.blocks[0].attention.q_norm.weight, extra["blocks.0.q_norm.weight"])


def test_heads_may_be_given_where_the_rotary_buffer_is_missing(oracle):
    bare = {name: tensor for name, tensor in oracle["state_dict"].items() if "inv_freq" not in name}
    assert fold_mdlm(bare, num_heads=4)[0].num_heads == 4
    with pytest.raises(UserError, match="give --num-heads"):
        fold_mdlm(bare)
    with pytest.raises(UserError, match="--num-heads is 5"):
        fold_mdlm(bare, num_heads=5)
    with pytest.raises(UserError, match="--num-heads is 8"):
        fold_mdlm(oracle["state_dict"], num_heads=8)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ("vocab_embed.learnable_noise_mu", "vocab_embed.learnable_noise_mu"),
        ("blocks.3.norm1.weight", "blocks.3.norm1.weight"),
        ("blocks.1.q_norm.weight", "blocks.1.q_norm.weight"),
    ],
)
def test_unknown_tensors_are_refused_by_name(oracle, extra, name):
    with pytest.raises(UserError, match=name):
        fold_mdlm(oracle["state_dict"] | {extra: torch.ones(64)})


def test_missing_tensors_and_foreign_rotary_bases_are_refused(oracle):
    for name in oracle["state_dict"]:
        if "inv_freq" not in name and name != "blocks.1.norm1.weight":
            with pytest.raises(UserError, match=name):
                fold_mdlm({other: t for other, t in oracle["state_dict"].items() if other != name})
    with pytest.raises(UserError, match="base 10000"):
        fold_mdlm(oracle["state_dict"] | {"rotary_emb.inv_freq": 0.9 ** torch.arange(8)})
    with pytest.raises(UserError, match=r"sigma_map\.mlp\.0\.weight"):
        fold_mdlm({})
