"""The Kneser-Ney evaluator against the textbook's formulas, and on real text."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.ngram import NgramEvaluator
from tests.data_pipeline.prepared import open_folder

VOCAB = 60


@pytest.fixture(scope="module")
def rows():
    """Rows of a random Markov chain with rare and unseen n-grams of every order; the first token is 0."""
    generator = np.random.default_rng(0)
    transition = generator.dirichlet(4 / np.arange(1, VOCAB - 1) ** 1.5, size=VOCAB)
    rows = np.zeros((150, 9), dtype=np.int32)
    for i in range(1, rows.shape[1]):
        rows[:, i] = [1 + generator.choice(VOCAB - 2, p=transition[last]) for last in rows[:, i - 1]]
    return rows


def textbook(rows, vocab_size, order):
    """p(w | context) by dictionaries and loops, straight from Chen and Goodman."""
    counts = [Counter() for _ in range(order + 1)]
    for row in rows.tolist():
        for i in range(1, len(row)):
            for n in range(1, min(order, i + 1) + 1):
                counts[n][tuple(row[i + 1 - n : i + 1])] += 1
    adjusted = {order: counts[order]}
    for n in range(order - 1, 0, -1):
        before = defaultdict(set)
        for gram in counts[n + 1]:
            before[gram[1:]].add(gram[0])
        starts = Counter(tuple(row[:n]) for row in rows.tolist()) if n > 1 else Counter()
        adjusted[n] = Counter({gram: len(before[gram]) + starts[gram] for gram in counts[n]})

    def discounts(table):
        n = [0] + [sum(count == i for count in table.values()) for i in (1, 2, 3, 4)]
        assert min(n[1:]) > 0, "the rows must be such that the discounts can be estimated"
        y = n[1] / (n[1] + 2 * n[2])
        return [0.0] + [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]

    discount = {n: discounts(table) for n, table in adjusted.items()}

    def probability(word, context):
        n = len(context) + 1
        lower = probability(word, context[1:]) if context else 1 / vocab_size
        following = [count for gram, count in adjusted[n].items() if gram[:-1] == context]
        if not following:
            return lower
        count = adjusted[n][(*context, word)]
        gamma = sum(discount[n][min(c, 3)] for c in following)
        return (count - discount[n][min(count, 3)] + gamma * lower) / sum(following)

    return probability


@pytest.mark.parametrize("order", [2, 3, 4])
def test_agrees_with_the_textbook(rows, order):
    evaluator = NgramEvaluator.fit(rows, VOCAB, order, eos_id=1)
    probability = textbook(rows, VOCAB, order)
    text = np.random.default_rng(1).integers(0, VOCAB, (4, 7))
    text[:2] = rows[:2, :7]
    expected = [
        [np.log(probability(row[i], tuple(row[max(0, i + 1 - order) : i]))) for i in range(1, len(row))]
        for row in text.tolist()
    ]
    np.testing.assert_allclose(evaluator.log_probs(text), expected, rtol=0, atol=1e-12)


def test_probabilities_are_positive_and_sum_to_one_after_any_context(rows):
    evaluator = NgramEvaluator.fit(rows, VOCAB, eos_id=1)
    contexts = np.random.default_rng(2).integers(0, VOCAB, (200, 3))
    contexts[:100] = rows[:100, 3:6]
    for length in (1, 2, 3):
        text = np.repeat(contexts[:, :length], VOCAB, axis=0)
        text = np.column_stack([text, np.tile(np.arange(VOCAB), len(contexts))])
        log_probs = evaluator.log_probs(text)[:, -1].reshape(len(contexts), VOCAB)
        assert np.isfinite(log_probs).all()
        np.testing.assert_allclose(np.exp(log_probs).sum(1), 1, atol=1e-12)


def test_corpus_too_small_to_estimate_discounts_still_gives_a_distribution():
    evaluator = NgramEvaluator.fit(np.array([[0, 1, 2, 3], [0, 1, 2, 4]]), 5, 3, eos_id=1)
    text = np.array([[0, 1, 2, word] for word in range(5)])
    probs = np.exp(evaluator.log_probs(text)[:, -1])
    assert probs.sum() == pytest.approx(1)
    assert set(np.argsort(probs)[-2:]) == {3, 4}


@pytest.fixture(scope="module")
def novels(tmp_path_factory):
    tokenizer, out = load_tokenizer(None), tmp_path_factory.mktemp("data") / "books"
    prepare(SourceSpec(), tokenizer, PrepareOptions(length=64), out)
    train, valid = (open_folder(out).first_blocks(split, 10**6) for split in ("train", "valid"))
    return tokenizer, train, valid, NgramEvaluator.fit(train, tokenizer.vocab_size, eos_id=tokenizer.eos_id)


def test_beats_add_one_on_held_out_text(novels):
    tokenizer, train, valid, evaluator = novels
    size = tokenizer.vocab_size
    pairs = np.bincount((train[:, :-1].astype(np.int64) * size + train[:, 1:]).ravel(), minlength=size**2)
    contexts = np.bincount(train[:, :-1].ravel(), minlength=size)
    held_out = valid[:, :-1].astype(np.int64) * size + valid[:, 1:]
    add_one = np.log((pairs[held_out] + 1) / (contexts[valid[:, :-1]] + size))
    ours = evaluator.log_probs(valid)
    assert ours.shape == add_one.shape
    assert -ours.mean() < -add_one.mean() - 1.0, "a nat a token better than an add-one bigram"


def test_tells_text_from_shuffled_text(novels):
    _, _, valid, evaluator = novels
    shuffled = np.array(valid)
    shuffled[:, 1:-1] = np.random.default_rng(0).permuted(shuffled[:, 1:-1], axis=1)
    assert evaluator.log_probs(shuffled).mean() < evaluator.log_probs(valid).mean() - 2.0


def test_description_names_the_model(novels):
    _, train, _, evaluator = novels
    assert "4-gram" in evaluator.description
    assert f"{train.shape[0] * 63:,}" in evaluator.description


def test_bad_input(rows):
    with pytest.raises(UserError, match="order of at most 3"):
        NgramEvaluator.fit(rows, 200_000, 4, eos_id=1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\)"):
        NgramEvaluator.fit(rows, 5, eos_id=1)
    with pytest.raises(ValueError, match="cannot fit order 4"):
        NgramEvaluator.fit(rows[:, :3], VOCAB, eos_id=1)
    with pytest.raises(ValueError, match="must lie in"):
        NgramEvaluator.fit(rows, VOCAB, eos_id=1).log_probs(np.array([[0, VOCAB]]))
