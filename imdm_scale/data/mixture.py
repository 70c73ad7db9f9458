"""Several streams mixed by weight into one whose position is still one integer.

Every `PERIOD` samples hold a fixed number of each stream's, in a random order that is a pure function of (seed,
period). So the shares are exact, and which sample of which stream sample i of the run is, follows from i alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from imdm_scale.data.stream import Stream
from imdm_scale.diffusion.noise import Purpose, uniform
from imdm_scale.errors import UserError

PERIOD = 1000
"""Samples after which every stream has had its exact share."""


def quotas(weights: Sequence[float]) -> list[int]:
    """Samples of each stream in a period: shares of `PERIOD` by largest remainder; the earlier stream wins a tie.

    Raises:
        UserError: a weight is so small beside the others that its stream would never be read.
    """
    exact = [weight * PERIOD / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        i = counts.index(0)
        raise UserError(
            f"data.weights gives corpus {i} the share {weights[i] / sum(weights):.2g}, but shares are counted in "
            f"1/{PERIOD} and this one would be 0; give it at least {sum(weights) / PERIOD:.3g}, or leave it out."
        )
    return counts


class Mixture(Stream):
    """Streams in exact shares; each goes through its own epochs, in its own order.

    Args:
        streams: of one length and one seed.
        weights: positive, in any unit; None mixes by size, so that all epochs end at about the same time.

    Raises:
        UserError: as `quotas`.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float] | None = None) -> None:
        self.streams = list(streams)
        self.quotas = quotas(weights or [stream.num_blocks for stream in streams])
        self.seed, self.length = streams[0].seed, streams[0].length
        self.num_blocks = sum(stream.num_blocks for stream in streams)
        parts = [f"{quota} {stream.data_hash}" for quota, stream in zip(self.quotas, streams, strict=True)]
        self.data_hash = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._periods: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_replaced(self) -> int:  # type: ignore[override]
        """See `Stream.num_replaced`."""
        return sum(stream.num_replaced for stream in self.streams)

    def fetch(self, samples: np.ndarray) -> Tensor:
        """See `Stream.fetch`."""
        ids = torch.empty((len(samples), self.length), dtype=torch.int64)
        sources, numbers = self.locate(samples)
        for index, stream in enumerate(self.streams):
            chosen = np.flatnonzero(sources == index)
            if len(chosen):
                ids[torch.from_numpy(chosen)] = stream.fetch(numbers[chosen])
        return ids

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For samples of the run: which stream, and the sample's number in it; int64 each."""
        periods, slots = np.divmod(samples, PERIOD)
        wanted = np.unique(periods).tolist()
        self._periods = {p: self._periods.get(p) or self._deal(p) for p in wanted}
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        for period in wanted:
            inside = periods == period
            of_slot, place_of_slot = self._periods[period]
            sources[inside], numbers[inside] = of_slot[slots[inside]], place_of_slot[slots[inside]]
        return sources, numbers

    def _deal(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream and number in it for each slot of a period."""
        slots = torch.arange(PERIOD)
        keys = uniform(self.seed, slots, Purpose.MIXTURE, period, 1, dtype=torch.float64)[:, 0, 0].numpy()
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[np.argsort(keys, kind="stable")]
        numbers = np.empty(PERIOD, dtype=np.int64)
        for index, quota in enumerate(self.quotas):
            numbers[sources == index] = period * quota + np.arange(quota)
        return sources, numbers

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "streams": [copy.copy(stream) for stream in self.streams], "_periods": {}}
