"""Counter-based noise: the published vectors, independence of the layout, and uniformity.

Statistical tests use fixed seeds, so they always give the same answer; a correct generator with a new seed
would fail each of them with probability 1e-4.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.noise import Purpose, mask_noise, philox4x32, uniform

FALSE_ALARM = 1e-4
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counters", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counters, key, answer):
    tensors = tuple(torch.tensor([word]) for word in counters)
    assert tuple(word.item() for word in philox4x32(tensors, key)) == answer
    assert philox4x32(counters, key) == answer


def test_philox_broadcasts_its_counters():
    whole = philox4x32((torch.arange(5), torch.arange(3)[:, None], torch.tensor(7), torch.tensor(9)), (1, 2))
    one = philox4x32((4, 2, 7, 9), (1, 2))
    assert [word[2, 4].item() for word in torch.broadcast_tensors(*whole)] == list(one)


def test_a_draw_is_what_its_counters_say():
    """The wiring of key and counters is part of the format: stored pairs of noise and text depend on it."""
    seed, sample, step, position, dim = 5 + (6 << 32), 7 + (8 << 32), 9 + (10 << 32), 11, 13
    key = philox4x32((int(Purpose.TOKEN), 9, 10, 0), (5, 6))[:2]
    ids = torch.tensor([sample])
    place = {"first_position": position, "first_dim": dim}
    single = uniform(seed, ids, Purpose.TOKEN, step, 1, **place).item()
    assert single == (philox4x32((dim // 4, position, 7, 8), key)[dim % 4] >> 8) * 2.0**-24
    double = uniform(seed, ids, Purpose.TOKEN, step, 1, **place, dtype=torch.float64).item()
    words = philox4x32((dim // 2, position, 7, 8), key)[2 * (dim % 2) :]
    assert double == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) * 2.0**-53


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 11)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_any_slice_is_the_slice_of_the_whole(seed, step, ids, sizes, dtype, data):
    length, dims = sizes
    whole = uniform(seed, torch.tensor(ids), Purpose.MASK_NOISE, step, length, dims, dtype=dtype)
    assert whole.shape == (len(ids), length, dims) and whole.dtype == dtype
    assert bool(((whole >= 0) & (whole < 1)).all())
    b, p, d = (data.draw(st.integers(0, size - 1)) for size in whole.shape)
    part = uniform(
        seed,
        torch.tensor(ids[b:]),
        Purpose.MASK_NOISE,
        step,
        length - p,
        dims - d,
        first_position=p,
        first_dim=d,
        dtype=dtype,
    )
    assert torch.equal(part, whole[b:, p:, d:])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_mask_noise_is_the_same_on_any_split_of_batch_and_positions(kind):
    ids = torch.tensor([3, 2**40, 17])
    whole = mask_noise(1, ids, 4, 6, 5, kind=kind, scale=2.0)
    assert torch.equal(
        mask_noise(1, ids[1:], 4, 2, 5, kind=kind, scale=2.0, first_position=3), whole[1:, 3:5]
    )
    assert torch.equal(mask_noise(1, ids, 4, 6, 3, kind=kind, scale=2.0), whole[..., :3])
    assert mask_noise(1, ids, 4, 6, 0, kind=kind).shape == (3, 6, 0)
    assert whole.dtype == torch.float32


def test_every_name_of_a_draw_matters():
    ids = torch.tensor([0, 1, 2**32])
    draws = [
        uniform(seed, ids, purpose, step, 3, 3, dtype=torch.float64).flatten()
        for seed in (0, 1, 2**32)
        for purpose in Purpose
        for step in (0, 1, 2**32)
    ]
    values = torch.cat(draws)
    assert values.unique().numel() == values.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_uniform_and_neighbours_independent(dtype):
    u = uniform(2, torch.arange(64), Purpose.TOKEN, 5, 64, 16, dtype=dtype)
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > FALSE_ALARM
    for first, second in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[..., :-1], u[..., 1:])):
        cells = (first * 8).long() * 8 + (second * 8).long()
        assert stats.chisquare(torch.bincount(cells.flatten(), minlength=64).numpy()).pvalue > FALSE_ALARM


def test_float64_uses_all_53_bits():
    u = uniform(2, torch.arange(256), Purpose.TOKEN, 5, 64, dtype=torch.float64).flatten()
    low_bits = (u * 2.0**53).long() & 0xFFFF
    assert torch.equal(u * 2.0**53, (u * 2.0**53).long().double())
    assert stats.chisquare(torch.bincount(low_bits >> 8, minlength=256).numpy()).pvalue > FALSE_ALARM


def test_mask_noise_has_the_law_it_names():
    ids = torch.arange(40)
    box = mask_noise(3, ids, 0, 32, 32, scale=1.5).flatten()
    assert bool(((box >= -1.5) & (box < 1.5)).all())
    assert stats.kstest(box.numpy(), "uniform", args=(-1.5, 3.0)).pvalue > FALSE_ALARM
    bell = mask_noise(3, ids, 0, 32, 32, kind="normal", scale=0.5)
    assert stats.kstest(bell.flatten().numpy(), "norm", args=(0.0, 0.5)).pvalue > FALSE_ALARM
    correlation = torch.corrcoef(torch.stack([bell[..., 0::2].flatten(), bell[..., 1::2].flatten()]))[
        0, 1
    ].item()
    assert abs(correlation) * math.sqrt(bell.numel() / 2) < stats.norm.isf(FALSE_ALARM / 2)


def test_impossible_requests_are_refused():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="seed and step"):
        uniform(-1, ids, Purpose.TIME, 0, 1)
    with pytest.raises(ValueError, match="seed and step"):
        uniform(0, ids, Purpose.TIME, 2**64, 1)
    with pytest.raises(ValueError, match="dtype"):
        uniform(0, ids, Purpose.TIME, 0, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="'uniform' or 'normal'"):
        mask_noise(0, ids, 0, 1, 1, kind="cauchy")
