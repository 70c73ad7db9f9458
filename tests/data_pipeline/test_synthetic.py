"""Synthetic tasks: samples follow the law that is claimed, and its numbers are those of an enumeration.

Shapes: S samples, L length (positions), V vocabulary, K hidden states.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.synthetic import AllEqual, HiddenMarkov, entropy
from imdm_scale.data.synthetic_source import id_tokenizer, is_synthetic, prepare_synthetic, synthetic_source
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError

HMM = HiddenMarkov(vocab_size=3, length=4, num_states=2, concentration=0.5, law_seed=3)
TASKS = [AllEqual(vocab_size=3, length=4), HMM]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_probabilities_are_those_of_all_sequences(task) -> None:
    sequences = np.array(list(itertools.product(range(3), repeat=4)))
    probs = task.all_probs()
    assert np.allclose(np.exp(task.log_probs(sequences)), probs, atol=1e-15)
    assert probs.sum() == pytest.approx(1, abs=1e-12)
    assert task.block_entropy().value == pytest.approx(entropy(probs), abs=1e-12)
    for i in range(4):
        marginal = np.bincount(sequences[:, i], weights=probs)
        assert np.allclose(marginal, task.token_probs(), atol=1e-12), "stationary"
    product = np.prod(task.token_probs()[sequences], axis=1)
    divergence = (probs[probs > 0] * np.log(probs[probs > 0] / product[probs > 0])).sum()
    assert task.total_correlation().value == pytest.approx(divergence, abs=1e-12)
    assert task.log_probs(np.array([[0, 1, 2, 3]])) == -np.inf


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_samples_follow_the_law(task) -> None:
    """A chi-square test at a false-alarm rate of 1e-6; the seed fixes the samples."""
    ids_SL = task.samples(seed=1, first=0, count=50_000)
    counts = np.bincount(ids_SL @ 3 ** np.arange(3, -1, -1), minlength=81)
    expected = task.all_probs() * len(ids_SL)
    assert counts[expected == 0].sum() == 0
    seen = expected > 5
    rare = [counts[~seen].sum()], [expected[~seen].sum()]
    observed, wanted = (np.append(a[seen], b) for a, b in zip((counts, expected), rare, strict=True))
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep], sum_check=False).pvalue > 1e-6
    assert np.array_equal(task.samples(1, 700, 10), ids_SL[700:710]), "a pure function of the sample's number"


def test_a_law_with_zeros_forbids_sequences() -> None:
    """So small a concentration leaves entries that float64 takes for 0."""
    task = HiddenMarkov(vocab_size=3, length=4, num_states=2, concentration=1e-3, law_seed=3)
    assert (task.emission_KV == 0).any()
    sequences = np.array(list(itertools.product(range(3), repeat=4)))
    log_probs = task.log_probs(sequences)
    assert np.isneginf(log_probs).any() and not np.isnan(log_probs).any()
    assert np.allclose(np.exp(log_probs), task.all_probs(), atol=1e-15)
    assert np.isfinite(task.log_probs(task.samples(0, 0, 1000))).all()


def test_known_numbers() -> None:
    assert AllEqual(vocab_size=32, length=8).total_correlation().value == pytest.approx(7 * np.log(32))
    low, high = HMM.entropy_rate_bounds()
    assert 0 < low <= high <= entropy(HMM.token_probs())


def test_large_laws_are_estimated_with_an_error() -> None:
    """The estimate lies within 5 standard errors of the truth: a false alarm of 6e-7; the seed fixes it."""
    large = HiddenMarkov(vocab_size=3, length=14, num_states=2, concentration=0.5, law_seed=3)
    assert large.all_probs() is None
    estimate = large.block_entropy()
    exact = [entropy(HiddenMarkov(3, n, 2, 0.5, 3).all_probs()) for n in (11, 12)]
    # The entropy grows by the conditional entropy of the last token, which has converged by then.
    assert abs(estimate.value - (exact[1] + 2 * (exact[1] - exact[0]))) < 5 * estimate.standard_error + 1e-4


def test_a_prepared_folder(tmp_path) -> None:
    source = synthetic_source("synthetic://all_equal?vocab_size=5&train=300&valid=20&seed=7", length=6)
    manifest = prepare_synthetic(source, tmp_path / "data")
    assert prepare_synthetic(source, tmp_path / "data") == manifest
    folder = PreparedFolder.open(str(tmp_path / "data"), FetchSettings(tmp_path / "cache", 1))
    train, valid = (folder.first_blocks(split, 10**6) for split in ("train", "valid"))
    assert train.shape == (300, 6) and valid.shape == (20, 6)
    assert np.array_equal(train, AllEqual(5, 6).samples(7, 0, 300))
    assert set(np.unique(train)) == set(range(5))
    tokenizer = load_tokenizer(folder.tokenizer_folder())
    assert tokenizer.fingerprint == id_tokenizer(5).fingerprint == manifest.tokenizer.fingerprint
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode([3, 0, 4]) == "3 0 4" and tokenizer.encode("3 0 4") == [3, 0, 4]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("synthetic://all_equl", "no synthetic task; .*all_equal"),
        ("synthetic://all_equal?vocab=3", "no parameter vocab"),
        ("synthetic://all_equal?vocab_size=1", "vocab_size must be an integer, at least 2"),
        ("synthetic://hmm?concentration=0", "concentration must be a number, above 0"),
        ("synthetic://hmm?states=x", "states must be an integer"),
    ],
)
def test_what_is_refused(path, said) -> None:
    assert is_synthetic(path)
    with pytest.raises(UserError, match=said):
        synthetic_source(path, 8)
