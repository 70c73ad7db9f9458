"""Synthetic tasks: laws of short sequences whose joint probabilities are known exactly.

A few-step sampler reveals many positions at once, each from its own marginal; what it loses by that is invisible in any
one token and shows only in the joint law. Here that law is known, so that the loss can be measured.

A sample is a pure function of (seed, sample number), a law one of its own parameters.

Shapes: S samples, L length (positions), V vocabulary, K hidden states.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from imdm_scale.diffusion.noise import Purpose, uniform

MOST_ENUMERATED = 1_000_000
"""Sequences, at most, that are enumerated; beyond it the law is known sample by sample only."""
MONTE_CARLO_SAMPLES = 100_000
"""Exact samples behind an estimate, where enumeration is too large."""
MONTE_CARLO_FIRST = 1 << 41
"""Number of the first sample that such an estimate uses: none of them is training or validation data."""


@dataclass(frozen=True)
class Estimate:
    """A number and how far to trust it."""

    value: float
    standard_error: float
    """0 where the number is exact."""


@dataclass(frozen=True)
class SyntheticTask(ABC):
    """A law of sequences of `length` ids in [0, vocab_size)."""

    vocab_size: int
    length: int

    @abstractmethod
    def samples(self, seed: int, first: int, count: int) -> np.ndarray:
        """Samples number `first` to `first` + `count` - 1, int64 (count, L)."""

    @abstractmethod
    def log_probs(self, ids_SL: np.ndarray) -> np.ndarray:
        """Exact ln p of each sequence in nats, float64 (S,); -inf for an impossible one, such as one with foreign
        ids."""

    @abstractmethod
    def token_probs(self) -> np.ndarray:
        """Exact law of the token at any one position, float64 (V,): both tasks are stationary."""

    @abstractmethod
    def pair_probs(self) -> np.ndarray:
        """Exact joint law of the tokens at two adjacent positions, float64 (V, V)."""

    @abstractmethod
    def block_entropy(self) -> Estimate:
        """Entropy of a whole sequence, H(X_1..X_L), in nats: exact, or by Monte Carlo of -ln p."""

    def all_probs(self) -> np.ndarray | None:
        """Exact probability of every sequence, float64 (V^L,), position 0 the most significant digit of the index.

        None where there are more than `MOST_ENUMERATED` of them.
        """
        if self.vocab_size**self.length > MOST_ENUMERATED:
            return None
        ids_SL = np.indices((self.vocab_size,) * self.length).reshape(self.length, -1).T
        return np.exp(self.log_probs(ids_SL))

    def total_correlation(self) -> Estimate:
        """sum_i H(X_i) - H(X_1..X_L) in nats: what a sampler that draws all positions independently loses.

        It is the least KL divergence of the law from a product (Watanabe, 1960), attained by the product of its
        marginals.
        """
        block = self.block_entropy()
        return Estimate(self.length * entropy(self.token_probs()) - block.value, block.standard_error)


@dataclass(frozen=True)
class AllEqual(SyntheticTask):
    """One id, uniform over the vocabulary, in every position (the synthetic task of IMDM, arXiv 2605.10518).

    Each position is as uncertain as can be and determines all others: total correlation (L - 1) ln V.
    """

    def samples(self, seed: int, first: int, count: int) -> np.ndarray:
        ids_S1 = np.floor(_uniform(seed, first, count, 0, 1) * self.vocab_size).astype(np.int64)
        return np.repeat(ids_S1, self.length, axis=1)

    def log_probs(self, ids_SL: np.ndarray) -> np.ndarray:
        ids_SL = np.asarray(ids_SL)
        possible_S = (ids_SL == ids_SL[:, :1]).all(axis=1) & _known(ids_SL, self.vocab_size)
        return np.where(possible_S, -np.log(self.vocab_size), -np.inf)

    def token_probs(self) -> np.ndarray:
        return np.full(self.vocab_size, 1 / self.vocab_size)

    def pair_probs(self) -> np.ndarray:
        return np.eye(self.vocab_size) / self.vocab_size

    def block_entropy(self) -> Estimate:
        return Estimate(float(np.log(self.vocab_size)), 0.0)


@dataclass(frozen=True)
class HiddenMarkov(SyntheticTask):
    """A random hidden Markov model in its stationary state (Rabiner, Proc. IEEE 77, 1989).

    Every row of the transition and the emission matrix is E^(1 / concentration), normalised, with E independent
    standard exponentials: at concentration 1 uniform on the simplex, below it ever nearer to a single entry.
    """

    num_states: int
    concentration: float
    """Above 0; the smaller, the more predictable."""
    law_seed: int
    """Names the two matrices, in [0, 2^64)."""

    @functools.cached_property
    def transition_KK(self) -> np.ndarray:
        """p(next state | state), float64."""
        return self._rows(0, self.num_states)

    @functools.cached_property
    def emission_KV(self) -> np.ndarray:
        """p(id | state), float64."""
        return self._rows(1, self.vocab_size)

    @functools.cached_property
    def stationary_K(self) -> np.ndarray:
        """The law of the state at any position: pi A = pi, sum pi = 1, float64."""
        identity_KK = np.eye(self.num_states)
        equations = np.vstack([(self.transition_KK - identity_KK).T, np.ones(self.num_states)])
        right = np.append(np.zeros(self.num_states), 1.0)
        return np.linalg.lstsq(equations, right, rcond=None)[0].clip(min=0.0)

    def samples(self, seed: int, first: int, count: int) -> np.ndarray:
        u_SL, v_SL = (_uniform(seed, first, count, step, self.length) for step in (0, 1))
        ids_SL = np.empty((count, self.length), dtype=np.int64)
        state_S = _pick(self.stationary_K[None], np.zeros(count, dtype=np.int64), u_SL[:, 0])
        for i in range(self.length):
            if i:
                state_S = _pick(self.transition_KK, state_S, u_SL[:, i])
            ids_SL[:, i] = _pick(self.emission_KV, state_S, v_SL[:, i])
        return ids_SL

    def log_probs(self, ids_SL: np.ndarray) -> np.ndarray:
        """By the forward algorithm, each step's messages scaled to sum 1 (Rabiner, equations 18-20 and 103)."""
        ids_SL = np.asarray(ids_SL)
        known_S = _known(ids_SL, self.vocab_size)
        ids_SL = np.where(known_S[:, None], ids_SL, 0)
        message_SK, log_prob_S = np.broadcast_to(self.stationary_K, (len(ids_SL), self.num_states)), 0.0
        for i in range(self.length):
            if i:
                message_SK = message_SK @ self.transition_KK
            message_SK = message_SK * self.emission_KV.T[ids_SL[:, i]]
            scale_S = message_SK.sum(axis=1)
            message_SK = message_SK / np.where(scale_S > 0, scale_S, 1.0)[:, None]
            with np.errstate(divide="ignore"):  # an entry of the law may be 0 in float64
                log_prob_S = log_prob_S + np.log(scale_S)
        return np.where(known_S, log_prob_S, -np.inf)

    def token_probs(self) -> np.ndarray:
        return self.stationary_K @ self.emission_KV

    def pair_probs(self) -> np.ndarray:
        first_KV = self.stationary_K[:, None] * self.emission_KV
        return first_KV.T @ self.transition_KK @ self.emission_KV

    def block_entropy(self) -> Estimate:
        probs = self.all_probs()
        if probs is not None:
            return Estimate(entropy(probs), 0.0)
        ids_SL = self.samples(self.law_seed, MONTE_CARLO_FIRST, MONTE_CARLO_SAMPLES)
        log_prob_S = self.log_probs(ids_SL)
        return Estimate(-float(log_prob_S.mean()), float(log_prob_S.std(ddof=1) / np.sqrt(len(log_prob_S))))

    def all_probs(self) -> np.ndarray | None:
        """As in the base class, by the forward algorithm over all prefixes at once."""
        return self._all_probs(self.stationary_K, self.length)

    def entropy_rate_bounds(self) -> tuple[float, float] | None:
        """Bounds in nats per token of the entropy rate, which has no closed form; None where too large to enumerate.

        H(X_L | X_1..X_{L-1}, S_1) <= rate <= H(X_L | X_1..X_{L-1}) (Cover and Thomas, Elements of Information Theory,
        theorem 4.5.1); they meet as L grows.
        """
        if self.all_probs() is None:
            return None

        def conditional(initial_K: np.ndarray) -> float:
            whole, shorter = (self._all_probs(initial_K, n) for n in (self.length, self.length - 1))
            assert whole is not None and shorter is not None
            return entropy(whole) - entropy(shorter)

        given_state_K = np.array([conditional(one_hot_K) for one_hot_K in np.eye(self.num_states)])
        return float(self.stationary_K @ given_state_K), conditional(self.stationary_K)

    def _all_probs(self, initial_K: np.ndarray, length: int) -> np.ndarray | None:
        """Probabilities of all sequences of some length from a law of the first state."""
        if self.vocab_size**length > MOST_ENUMERATED:
            return None
        message_NK = initial_K[None] if length else np.ones((1, 1))
        for i in range(length):
            if i:
                message_NK = message_NK @ self.transition_KK
            message_NK = (message_NK[:, None] * self.emission_KV.T).reshape(-1, self.num_states)
        return message_NK.sum(axis=1)

    def _rows(self, step: int, width: int) -> np.ndarray:
        states = torch.arange(self.num_states)
        u_KW = uniform(
            self.law_seed, states, Purpose.SYNTHETIC_LAW, step, 1, width, dtype=torch.float64
        ).numpy()[:, 0]
        log_weight_KW = np.log(-np.log1p(-u_KW)) / self.concentration
        weight_KW = np.exp(log_weight_KW - log_weight_KW.max(axis=1, keepdims=True))
        return weight_KW / weight_KW.sum(axis=1, keepdims=True)


def entropy(probs: np.ndarray) -> float:
    """-sum p ln p in nats over all entries, 0 ln 0 = 0."""
    positive = probs[probs > 0]
    return float(-(positive * np.log(positive)).sum())


def _uniform(seed: int, first: int, count: int, step: int, length: int) -> np.ndarray:
    sample_ids_S = torch.arange(first, first + count)
    u_SL1 = uniform(seed, sample_ids_S, Purpose.SYNTHETIC_SAMPLE, step, length, dtype=torch.float64)
    return u_SL1.numpy()[..., 0]


def _pick(probs_RW: np.ndarray, rows_S: np.ndarray, u_S: np.ndarray) -> np.ndarray:
    """One of W entries by the law in each sample's row: the first whose cumulative probability exceeds u."""
    cumulative_RW = probs_RW.cumsum(axis=1)
    cumulative_RW /= cumulative_RW[:, -1:]
    num_rows, width = probs_RW.shape
    # One sorted array for all rows: row r lies in [r, r + 1].
    shelf = (cumulative_RW + np.arange(num_rows)[:, None]).ravel()
    return np.clip(np.searchsorted(shelf, rows_S + u_S, side="right") - rows_S * width, 0, width - 1)


def _known(ids_SL: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.all((ids_SL >= 0) & (ids_SL < vocab_size), axis=1)
