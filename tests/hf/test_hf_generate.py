"""Text generation from the transformers model."""

from __future__ import annotations

import pytest
import torch


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
