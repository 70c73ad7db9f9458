"""The few-step sampler: its law on a toy network against enumeration, and its promises.

Statistical tests use fixed seeds; a correct program with a new seed would fail each with probability 1e-4.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.diffusion.sampler import SamplerSettings, draw_tokens, sample, sample_by

FALSE_ALARM = 1e-4
LENGTH, VOCAB, MASK = 3, 2, 2
NUM_TEXTS = 40_000


def toy(x_BL: torch.Tensor, noise_BLD: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, 3) that depend on how many zeros and ones are revealed and on the signs of the noise of
    masked positions; exchangeable over positions. The mask's own logit is the largest, yet never chosen.
    """
    ones = (x_BL == 1).sum(-1, keepdim=True) - (x_BL == 0).sum(-1, keepdim=True)
    signs_BL = torch.where(x_BL == MASK, noise_BLD[..., 0].sign(), 0.0)
    score_BL = 0.8 * ones + 1.5 * signs_BL + 0.3 * signs_BL.sum(-1, keepdim=True)
    return torch.stack([torch.zeros_like(score_BL), score_BL, torch.full_like(score_BL, 50.0)], -1)


def enumerated_law(num_steps: int, fixed_noise: bool, start_time: float, x_t: tuple[int, ...]) -> dict:
    """Law of the final text: the chain over the states 0, 1, mask with negative e, mask with positive e."""
    minus, plus = 2, 3
    free = [i for i in range(LENGTH) if x_t[i] == MASK]
    law: Counter = Counter()
    for signs in itertools.product((minus, plus), repeat=len(free)):
        state = list(x_t)
        for i, sign in zip(free, signs, strict=True):
            state[i] = sign
        law[tuple(state)] += 0.5 ** len(free)

    for i in range(num_steps):
        a_t, a_s = (1 - 0.999 * start_time * (1 - k / num_steps) for k in (i, i + 1))
        unmask = (a_s - a_t) / (1 - a_t)
        keep = (a_t / a_s - a_t) / (1 - a_t)
        reset = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
        if fixed_noise:
            keep, reset = keep + reset, 0.0
        after: Counter = Counter()
        for state, mass in law.items():
            x = torch.tensor([[min(v, MASK) for v in state]])
            e = torch.tensor([[[{minus: -1.0, plus: 1.0}.get(v, 0.0)] for v in state]])
            p = toy(x, e)[0, :, :VOCAB].double().softmax(-1)
            choices = []
            for position, v in enumerate(state):
                if v < MASK:
                    choices.append([(v, 1.0)])
                    continue
                moves = Counter({token: unmask * p[position, token].item() for token in range(VOCAB)})
                moves[v] += keep
                moves[minus] += reset / 2
                moves[plus] += reset / 2
                choices.append(list(moves.items()))
            for combination in itertools.product(*choices):
                weight = mass
                for _, q in combination:
                    weight *= q
                if weight > 0.0:
                    after[tuple(v for v, _ in combination)] += weight
        law = after
    return dict(law)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("fixed_noise", [False, True])
@pytest.mark.parametrize(("start_time", "x_t"), [(1.0, (2, 2, 2)), (0.6, (2, 1, 2))])
def test_the_samplers_law_is_that_of_the_reverse_chain(num_steps, fixed_noise, start_time, x_t):
    n = NUM_TEXTS
    x = sample(
        toy,
        torch.tensor([x_t]).expand(n, -1),
        settings=SamplerSettings(num_steps, fixed_noise=fixed_noise),
        seed=num_steps,
        sample_ids_B=torch.arange(n),
        mask_id=MASK,
        noise_dim=1,
        start_time=start_time,
    )
    law = enumerated_law(num_steps, fixed_noise, start_time, x_t)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-9)
    seen = Counter(map(tuple, x.tolist()))
    assert set(seen) <= set(law)
    texts = sorted(law)
    expected = torch.tensor([law[text] for text in texts]).double()
    counts = [seen[text] for text in texts]
    assert stats.chisquare(counts, (n * expected / expected.sum()).numpy()).pvalue > FALSE_ALARM


def test_resetting_and_fixed_noise_have_laws_that_the_test_above_tells_apart():
    reset, fixed = (enumerated_law(4, fixed_noise, 1.0, (2, 2, 2)) for fixed_noise in (False, True))
    # Mean of the chi-square statistic, above its 7 degrees of freedom, if one law were taken for the other.
    assert sum(NUM_TEXTS * (reset[text] - fixed[text]) ** 2 / reset[text] for text in reset) > 60.0


VOCAB_8, MASK_8 = 8, 5
TABLE = torch.randn(VOCAB_8, VOCAB_8, generator=torch.Generator().manual_seed(3))


class Recorder:
    """A network that ignores the noise, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x_BL, noise_BLD):
        self.calls.append((x_BL.clone(), noise_BLD.clone()))
        one_hot = torch.nn.functional.one_hot(x_BL, VOCAB_8).float()
        logits_BLV = (one_hot.roll(1, 1) + 2 * one_hot.roll(-1, 1) + one_hot.mean(1, keepdim=True)) @ TABLE
        logits_BLV[..., MASK_8] = 30.0
        return logits_BLV


def run(settings, x_t=None, batch=8, length=16, noise_dim=2, network=None, ids=None, **options):
    x_t = torch.full((batch, length), MASK_8) if x_t is None else x_t
    ids = torch.arange(len(x_t)) if ids is None else ids
    network = network or Recorder()
    return sample(
        network,
        x_t,
        settings=settings,
        seed=11,
        sample_ids_B=ids,
        mask_id=MASK_8,
        noise_dim=noise_dim,
        **options,
    )


@settings(max_examples=40)
@given(
    num_steps=st.integers(1, 9),
    fixed_noise=st.booleans(),
    greedy=st.booleans(),
    tokens=st.lists(st.integers(0, VOCAB_8 - 1), min_size=12, max_size=12),
    start_time=st.floats(0.05, 1.0),
)
def test_given_positions_stay_all_masks_go_and_evaluations_are_counted(
    num_steps, fixed_noise, greedy, tokens, start_time
):
    x_t = torch.tensor(tokens).view(2, 6)
    before = x_t.clone()
    network = Recorder()
    options = SamplerSettings(num_steps, fixed_noise=fixed_noise, greedy_last_step=greedy, top_p=0.9)
    x_0 = run(options, x_t, network=network, start_time=start_time)
    assert len(network.calls) == num_steps
    assert torch.equal(x_t, before)
    assert torch.equal(x_0[x_t != MASK_8], x_t[x_t != MASK_8])
    assert not bool((x_0 == MASK_8).any())
    for (earlier, _), (later, _) in itertools.pairwise(network.calls):
        assert torch.equal(later[earlier != MASK_8], earlier[earlier != MASK_8])


@pytest.mark.parametrize("greedy", [False, True])
def test_a_step_asks_only_for_the_positions_that_it_reveals_and_always_once(greedy):
    """In every step, also without any position: networks cut over processes stay in step."""
    options = SamplerSettings(5, temperature=0.7, greedy_last_step=greedy)
    names = {"seed": 11, "sample_ids_B": torch.arange(2), "mask_id": MASK_8, "noise_dim": 2}
    asked: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def draw(x_BL, noise_BLD, positions_N, u_N, greedy):
        asked.append((positions_N, u_N, greedy))
        logits_NV = Recorder()(x_BL, noise_BLD).flatten(0, 1)[positions_N]
        return draw_tokens(logits_NV, u_N, mask_id=MASK_8, temperature=0.7, greedy=greedy)

    x_t = torch.full((2, 3), MASK_8)
    x_0 = sample_by(draw, x_t, settings=options, **names)
    assert torch.equal(x_0, run(options, x_t))
    assert len(asked) == 5 and any(len(positions) == 0 for positions, _, _ in asked[:-1])
    assert torch.cat([positions for positions, _, _ in asked]).sort().values.tolist() == list(range(6))
    for step, (positions, u, is_greedy) in enumerate(asked):
        u_BL1 = uniform(11, torch.arange(2), Purpose.TOKEN, step, 3, dtype=torch.float64)
        assert torch.equal(u, u_BL1.flatten()[positions])
        assert is_greedy == (greedy and step == 4)

    asked.clear()
    assert torch.equal(sample_by(draw, x_0, settings=options, **names), x_0)
    assert [len(positions) for positions, _, _ in asked] == [0] * 5


def test_a_network_that_ignores_the_noise_samples_as_without_any_noise():
    """Bit for bit: an infinite mask with a zero embedding is a plain mask, whatever becomes of e."""
    plain = run(SamplerSettings(6), noise_dim=0)
    for fixed_noise in (False, True):
        for kind in ("uniform", "normal"):
            options = SamplerSettings(6, fixed_noise=fixed_noise)
            assert torch.equal(run(options, noise_dim=5, noise_kind=kind, noise_scale=2.0), plain)


def test_a_sample_does_not_depend_on_its_batch():
    whole = run(SamplerSettings(5))
    for part in (slice(0, 3), slice(3, 8)):
        assert torch.equal(
            run(SamplerSettings(5), batch=part.stop - part.start, ids=torch.arange(8)[part]), whole[part]
        )


def test_start_times_may_differ_between_samples():
    times = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    together = run(SamplerSettings(4), batch=3, start_time=times)
    for i in range(3):
        alone = run(SamplerSettings(4), batch=1, ids=torch.tensor([i]), start_time=times[i].item())
        assert torch.equal(together[i : i + 1], alone)


def test_fixed_noise_never_changes():
    network = Recorder()
    run(SamplerSettings(6, fixed_noise=True), network=network)
    assert all(torch.equal(noise, network.calls[0][1]) for _, noise in network.calls)


def test_resets_redraw_the_noise_as_often_as_the_posterior_says():
    network = Recorder()
    num_steps = 5
    run(SamplerSettings(num_steps), network=network, batch=300, length=64)
    for i, ((x, noise), (x_next, noise_next)) in enumerate(itertools.pairwise(network.calls)):
        a_t, a_s = (1 - 0.999 * (1 - k / num_steps) for k in (i, i + 1))
        masked, still = x == MASK_8, x_next == MASK_8
        changed = (noise != noise_next).any(-1)
        assert torch.equal(changed, (noise != noise_next).all(-1))
        assert not bool((changed & ~still).any())
        counts = [int((masked & ~still).sum()), int((still & ~changed).sum()), int(changed.sum())]
        a = a_t / a_s
        masses = [(a_s - a_t) / (1 - a_t), a * (1 - a_s) / (1 - a_t), (1 - a) * (1 - a_s) / (1 - a_t)]
        expected = [mass * sum(counts) for mass in masses]
        assert stats.chisquare(counts, expected, sum_check=False).pvalue > FALSE_ALARM
    final_noise = network.calls[-1][1]
    assert final_noise.unique().numel() > 0.99 * network.calls[0][1].unique().numel()


def test_the_last_step_can_be_greedy_and_only_the_last():
    network = Recorder()
    x_0 = run(SamplerSettings(3, greedy_last_step=True), network=network)
    x_last = network.calls[-1][0]
    logits = network(x_last, torch.empty(0))
    logits[..., MASK_8] = -torch.inf
    filled = x_last == MASK_8
    assert bool(filled.any())
    assert torch.equal(x_0[filled], logits.argmax(-1)[filled])
    sampled = Recorder()
    run(SamplerSettings(3), network=sampled)
    assert torch.equal(sampled.calls[-1][0], x_last)


def test_temperature_and_nucleus_sharpen_tokens_but_not_the_order_of_revealing():
    reference = Recorder()
    run(SamplerSettings(4), network=reference)
    for options in (SamplerSettings(4, temperature=1e-4), SamplerSettings(4, top_p=1e-4)):
        network = Recorder()
        run(options, network=network)
        for i, ((x, _), (x_reference, _)) in enumerate(zip(network.calls, reference.calls, strict=True)):
            assert torch.equal(x == MASK_8, x_reference == MASK_8)
            if i + 1 < 4:
                x_next = network.calls[i + 1][0]
                logits = Recorder()(x, torch.empty(0))
                logits[..., MASK_8] = -torch.inf
                revealed = (x == MASK_8) & (x_next != MASK_8)
                assert torch.equal(x_next[revealed], logits.argmax(-1)[revealed])


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1, "temperature": 0.0}, "temperature"),
        ({"num_steps": 1, "top_p": 0.0}, "top_p"),
        ({"num_steps": 1, "top_p": 1.5}, "top_p"),
    ],
)
def test_wrong_settings_are_refused(wrong, name):
    with pytest.raises(ValueError, match=name):
        SamplerSettings(**wrong)


@pytest.mark.parametrize("start_time", [0.0, 1.1, torch.tensor([0.5, 2.0])])
def test_start_times_outside_the_range_are_refused(start_time):
    with pytest.raises(ValueError, match="start_time"):
        run(SamplerSettings(2), batch=2, start_time=start_time)
