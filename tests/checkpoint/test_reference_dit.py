"""Our plain reference network is the published one, by recorded activations and by the names and order of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imdm_scale.checkpoint.reference_dit import load_reference, shape_of
from tests.checkpoint.references import VARIANTS, reference

ORACLE = Path(__file__).resolve().parent.parent / "data" / "mdlm_dit.pt"


def test_it_computes_what_mdlms_network_computed() -> None:
    oracle = torch.load(ORACLE, weights_only=True)
    network = load_reference(oracle["state_dict"], shape_of(oracle["state_dict"], 4))
    with torch.no_grad():
        torch.testing.assert_close(network(oracle["indices"]), oracle["output_sigma0"], rtol=0, atol=1e-5)
        for i, sigma in enumerate(oracle["sigma"].tolist()):
            logits = network(oracle["indices"][i : i + 1], sigma=sigma)
            torch.testing.assert_close(logits, oracle["output"][i : i + 1], rtol=0, atol=1e-5)


def test_its_weights_have_mdlms_names_in_mdlms_order() -> None:
    oracle = torch.load(ORACLE, weights_only=True)["state_dict"]
    network = load_reference(oracle, shape_of(oracle, 4))
    assert list(network.state_dict()) == list(oracle)
    assert [name for name, _ in network.named_parameters()] == [
        n for n in oracle if n != "rotary_emb.inv_freq"
    ]
    assert torch.equal(network.rotary_emb.inv_freq, oracle["rotary_emb.inv_freq"])


def test_imdms_weights_have_imdms_names_in_imdms_order() -> None:
    names = [name for name, p in reference(noise_dim=6, qk_norm=True).named_parameters() if p.requires_grad]
    assert names[:4] == [
        "vocab_embed.embedding",
        "vocab_embed.imdm_mlp.0.weight",
        "vocab_embed.imdm_mlp.0.bias",
        "vocab_embed.imdm_mlp.2.weight",
    ]
    first = names.index("blocks.0.q_norm.weight")
    assert names[first : first + 5] == [
        *(f"blocks.0.{name}" for name in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")),
        "blocks.0.norm1.weight",
    ]
    one = dict(reference(num_masks=1).named_parameters())["vocab_embed.imdm_mlp.weight"]
    assert not one.requires_grad and one.shape == (1, 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shape_is_read_from_the_tensors(variant: str) -> None:
    network = reference(**VARIANTS[variant])
    tensors = network.state_dict()
    heads = 32 // (2 * len(tensors["rotary_emb.inv_freq"]))
    found = shape_of(tensors, heads, VARIANTS[variant].get("softcap", 0.0))
    load_reference(tensors, found)
    assert found == type(found)(**{**found.__dict__, **VARIANTS[variant]})
