"""Text generation from the transformers model."""

from __future__ import annotations

import itertools

import pytest
import torch

from imdm_scale.diffusion.coupling import coordinates
from imdm_scale.diffusion.noise import mask_noise
from imdm_scale.diffusion.sampler import SAMPLERS
from imdm_scale.diffusion.vocabulary_order import ranks_of

MASK = 30


def test_the_seed_decides_and_torch_does_not(network):
    model = network()
    torch.manual_seed(0)
    first = model.generate_text(4, num_steps=3, seed=11)
    torch.manual_seed(1)
    assert torch.equal(first, model.generate_text(4, num_steps=3, seed=11))
    assert not torch.equal(first, model.generate_text(4, num_steps=3, seed=12))
    assert first.shape == (4, 12) and first.dtype == torch.int64
    assert (first != model.config.mask_token_id).all()


def test_a_sample_does_not_depend_on_how_many_there_are(network):
    model = network()
    many = model.generate_text(6, num_steps=4, seed=3)
    assert torch.equal(many[:2], model.generate_text(2, num_steps=4, seed=3))
    assert len({tuple(row) for row in many.tolist()}) == 6


def test_prefix_is_kept_and_matters(network):
    model = network(bos_token_id=1)
    one = model.generate_text(3, num_steps=2, seed=0, prefix_ids=[4, 5, 6])
    assert one[:, :3].tolist() == [[4, 5, 6]] * 3
    each = torch.tensor([[4, 5], [7, 8], [9, 10]])
    assert torch.equal(model.generate_text(3, num_steps=2, seed=0, prefix_ids=each)[:, :2], each)
    other = model.generate_text(3, num_steps=2, seed=0, prefix_ids=[9, 2, 17])
    assert not torch.equal(one[:, 3:], other[:, 3:])


def test_gaps_of_a_template_are_filled(network):
    model = network()
    template = torch.tensor([3, 30, 30, 6, 30, 8, 30, 30, 30, 30, 30, 12])
    text = model.generate_text(2, num_steps=3, seed=0, prefix_ids=template)
    given = template != 30
    assert torch.equal(text[:, given], template[given].expand(2, -1))
    assert (text != 30).all()


def test_text_without_prefix_begins_with_the_bos_token_where_there_is_one(network):
    assert (network(bos_token_id=17).generate_text(20, num_steps=1, seed=0)[:, 0] == 17).all()
    assert len(set(network().generate_text(20, num_steps=1, seed=0)[:, 0].tolist())) > 1


def test_length_of_the_text(network):
    assert network().generate_text(2, num_steps=2, seed=0, length=5).shape == (2, 5)
    whole = network().generate_text(2, num_steps=2, seed=0, length=3, prefix_ids=[1, 2, 3])
    assert whole.tolist() == [[1, 2, 3]] * 2


def test_settings_reach_the_sampler(network):
    model = network()
    plain = model.generate_text(8, num_steps=6, seed=0)
    assert not torch.equal(plain, model.generate_text(8, num_steps=6, seed=0, temperature=0.3))
    assert not torch.equal(plain, model.generate_text(8, num_steps=6, seed=0, top_p=0.3))
    assert not torch.equal(plain, model.generate_text(8, num_steps=6, seed=0, fixed_noise=True))
    greedy = model.generate_text(8, num_steps=1, seed=0, greedy_last_step=True)
    assert torch.equal(greedy, model.generate_text(8, num_steps=1, seed=0, top_p=1e-9))


def test_the_model_samples_as_its_configuration_says(network):
    texts = {name: network().generate_text(8, num_steps=3, seed=0, sampler=name) for name in SAMPLERS}
    for name in SAMPLERS:
        assert torch.equal(network(sampler=name).generate_text(8, num_steps=3, seed=0), texts[name])
    assert torch.equal(network().generate_text(8, num_steps=3, seed=0), texts["ancestral"])
    for one, other in itertools.combinations(SAMPLERS, 2):
        assert not torch.equal(texts[one], texts[other])
    with pytest.raises(ValueError, match="the sampler is 'beam'"):
        network().generate_text(1, num_steps=1, seed=0, sampler="beam")


def test_a_coupled_text_is_that_of_its_noise(network):
    """In one step: every token by inverse CDF, in the vocabulary's order, of the uniform in its mask's noise."""
    model = network(sampler="coupled", vocabulary_order="frequency", noise_fourier=2)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    model.vocabulary_rank.copy_(ranks_of(order))
    text = model.generate_text(4, num_steps=1, seed=5)
    noise = mask_noise(5, torch.arange(4), 0, 12, 6)
    with torch.no_grad():
        logits = model(torch.full((4, 12), MASK), mask_noise=noise).logits[..., order].double()
    logits[..., order == MASK] = -torch.inf
    cdf = logits.softmax(-1).cumsum(-1)
    place = torch.searchsorted(cdf, coordinates(noise).u[..., None], right=True)[..., 0]
    assert torch.equal(text, order[place])


@pytest.mark.parametrize("training", [False, True])
def test_runs_in_evaluation_mode_without_gradient_and_restores_training(network, training):
    model = network(dropout=0.5).train(training)
    seen = []
    model.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.logits.requires_grad))
    )
    model.generate_text(1, num_steps=3, seed=0)
    assert seen == [(False, False)] * 3
    assert model.training is training
    with pytest.raises(ValueError, match="seed"):
        model.generate_text(1, num_steps=3, seed=-1)
    assert model.training is training


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        (list(range(13)), "13 ids"),
        (torch.zeros(3, 2, dtype=torch.long), "3 prefixes for 2 samples"),
        ([31], "outside"),
        ([-1], "outside"),
    ],
)
def test_bad_prefix_is_refused(network, prefix, match):
    with pytest.raises(ValueError, match=match):
        network().generate_text(2, num_steps=1, seed=0, prefix_ids=prefix)
