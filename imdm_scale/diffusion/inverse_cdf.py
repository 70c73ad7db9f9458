"""One token from logits and one uniform number, over a whole or a cut vocabulary.

Probabilities become integers first: the weight of a token is exp((logit - largest) / temperature) in float64,
rounded to a multiple of 2^-44. Sums of integers are exact in any order, so the token is the same, bit for bit,
for every way of cutting the vocabulary over processes and for every order in which a device adds; floating
point promises neither. Only exp rounds before, and it sees one logit at a time.

Rounding costs at most V 2^-45 in total variation (1.5e-9 for 50,000 tokens; tokens less likely than 2^-45 of the
likeliest are never drawn). Float32 would cost a million times as much: the steps of its cumulative sum err by
2^-25 each and more, V 2^-25 in all. Float32 Gumbel noise, too, biases masked diffusion towards low
temperature (Zheng et al., "Masked diffusion models are secretly time-agnostic masked models", arXiv
2409.02908).

Shapes: N positions, R positions of one chunk, V vocabulary (or the shard that `vocabulary` describes), W = V + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .vocabulary import WHOLE, Vocabulary

WEIGHT_BITS = 44
"""The likeliest token's weight is 2^44, so that a vocabulary of up to 2^18 sums to at most 2^62. A constant,
since the same token must come out however the vocabulary is cut."""

RANK_BITS = 18
"""Places in an order of the vocabulary lie below 2^18, as ids do."""

MAX_ELEMENTS = 2**24
"""Weights held at a time: 128 MiB for each of a few temporaries."""


@torch.no_grad()
def inverse_cdf(
    logits_NV: Tensor,
    u_N: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    vocabulary: Vocabulary = WHOLE,
    rank_V: Tensor | None = None,
) -> Tensor:
    """The first id, in the order of ids or another, whose cumulative weight exceeds u times the total.

    Collective over the shards of the vocabulary, which must have equal widths and the same u.

    Args:
        logits_NV: logits of any floating type; forbid the mask id first.
        u_N: float64 uniforms in [0, 1).
        temperature: > 0; divides the logits.
        top_p: in (0, 1]; nucleus, applied after the temperature. 1 keeps everything.
        vocabulary: how the columns of the logits map to token ids; at most 2^18 in all.
        rank_V: int64 place of each of these columns in the order (`vocabulary_order.py`): over all shards different
            numbers in [0, 2^18). None is the order of ids.

    Returns:
        int64 (N,), the same on all shards; never an id of weight zero. A row with a NaN gives some id of the
        vocabulary: that a network has diverged shows in its loss, not as an index out of range.
    """
    rows = max(1, MAX_ELEMENTS // logits_NV.shape[-1])
    order = None if rank_V is None else rank_V.to(logits_NV.device).sort()
    ids = [
        _inverse_cdf(logits_RV, u_R, temperature, top_p, vocabulary, order)
        for logits_RV, u_R in zip(logits_NV.split(rows), u_N.split(rows), strict=True)
    ]
    return torch.cat(ids)


@torch.no_grad()
def argmax(logits_NV: Tensor, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """The most likely id, the lowest of equals: int64 (N,), the same on all shards. Collective over them."""
    top_N, column_N = logits_NV.max(-1)
    beaten_N = top_N.double() < vocabulary.max(top_N.double()[:, None])
    id_N = (vocabulary.first_id + column_N).masked_fill(beaten_N, torch.iinfo(torch.int64).max)
    return -vocabulary.max(-id_N[:, None])


def _inverse_cdf(
    logits_RV: Tensor,
    u_R: Tensor,
    temperature: float,
    top_p: float,
    vocabulary: Vocabulary,
    order: tuple[Tensor, Tensor] | None,
) -> Tensor:
    weight_RV = integer_weights(logits_RV, temperature, vocabulary)
    if top_p < 1.0:
        weight_RV = keep_nucleus(weight_RV, top_p, vocabulary)
    if order is not None:
        weight_RV = weight_RV[:, order[1]]
    cdf_RV = weight_RV.cumsum(-1)
    total_R = vocabulary.sum(cdf_RV[:, -1:])
    threshold_R = torch.minimum((u_R * total_R).long(), total_R - 1)
    if order is not None:
        return _first_above(cdf_RV, threshold_R, vocabulary, *order)
    threshold_R -= vocabulary.exclusive_sum(cdf_RV[:, -1])
    not_above_R1 = torch.searchsorted(cdf_RV, threshold_R[:, None], right=True)
    return vocabulary.sum(not_above_R1)


def _first_above(
    cdf_RV: Tensor, threshold_R: Tensor, vocabulary: Vocabulary, rank_V: Tensor, column_V: Tensor
) -> Tensor:
    """The id at which the cumulative weight of an order that runs across the shards first exceeds a threshold.

    Args:
        cdf_RV: cumulative weights of this shard's columns, in the order.
        rank_V, column_V: places, ascending, and columns of this shard in the order.
    """
    mass_RW = pad(cdf_RV, (1, 0))

    def mass_before(rank_R: Tensor) -> Tensor:
        """Mass over all shards of the tokens with a smaller rank."""
        return vocabulary.sum(mass_RW.gather(-1, torch.searchsorted(rank_V, rank_R)[:, None]))

    # From its highest bit down the largest rank before which no more than the threshold lies: the token's own.
    rank_R = torch.zeros_like(threshold_R)
    for bit in reversed(range(RANK_BITS)):
        raised_R = rank_R + 2**bit
        rank_R = raised_R.where(mass_before(raised_R) <= threshold_R, rank_R)

    place_R = torch.searchsorted(rank_V, rank_R).clamp(max=len(rank_V) - 1)
    id_R = (vocabulary.first_id + column_V[place_R]).where(rank_V[place_R] == rank_R, 0)
    return vocabulary.sum(id_R[:, None])


def integer_weights(logits_NV: Tensor, temperature: float = 1.0, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Probabilities as int64 (N, V) in units of 2^-44 of the likeliest token's, which weighs 2^44."""
    x_NV = logits_NV.double()
    x_NV = x_NV - vocabulary.max(x_NV)[:, None]
    p_NV = x_NV.div_(temperature).exp_().nan_to_num_(0.0)
    return p_NV.mul_(2.0**WEIGHT_BITS).round_().long()


def keep_nucleus(weight_NV: Tensor, top_p: float, vocabulary: Vocabulary = WHOLE) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al., "The
    curious case of neural text degeneration", arXiv 1904.09751); of equal tokens the lower ids come first.

    Args:
        weight_NV: int64 weights, from 0 to 2^44. The mass to reach is top_p times their sum, rounded up.
    """
    negated_NV = (-weight_NV).sort(-1).values
    mass_NW = pad(-negated_NV.cumsum(-1), (1, 0))

    def mass_from(least_N: Tensor) -> Tensor:
        """Mass over all shards of the tokens that weigh at least so much."""
        return vocabulary.sum(
            mass_NW.gather(-1, torch.searchsorted(negated_NV, -least_N[:, None], right=True))
        )

    total_N = vocabulary.sum(mass_NW[:, -1:])
    target_N = torch.minimum((top_p * total_N.double()).ceil().long().clamp(min=1), total_N)
    # The least weight of the nucleus, from its highest bit down: the largest that still leaves enough mass.
    least_N = torch.zeros_like(target_N)
    for bit in reversed(range(WEIGHT_BITS + 1)):
        raised_N = least_N + 2**bit
        least_N = raised_N.where(mass_from(raised_N) >= target_N, least_N)

    missing_N = target_N - mass_from(least_N + 1)
    num_tied_N = (missing_N + least_N - 1) // least_N
    tied_NV = weight_NV == least_N[:, None]
    rank_NV = tied_NV.cumsum(-1)
    rank_NV += vocabulary.exclusive_sum(rank_NV[:, -1])[:, None]
    return weight_NV.where((weight_NV > least_N[:, None]) | (tied_NV & (rank_NV <= num_tied_N[:, None])), 0)
