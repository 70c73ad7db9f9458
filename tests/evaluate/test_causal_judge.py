"""A causal judge against a computation by hand, one text and one token at a time.

L positions, S samples.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.causal_judge import CausalJudge, text_of
from imdm_scale.evaluate.metrics import SampleScores
from tests.small_tokenizers import END, byte_level, json_folder

LENGTH = 24
"""Of the judge, in its tokens."""
TEXTS = (
    f"{END}He said nothing.{END}",
    f"{END}A day{END} and a night{END}{END}",
    f"{END}It was the best of times, it was the worst of times, it was the age of wisdom, it was the age",
    "The end",
    f"{END}{END}{END}",
)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 24 positions with a tokenizer like GPT-2's."""
    folder = json_folder(
        tmp_path_factory.mktemp("judges") / "gpt2-tiny", byte_level(), eos_token=END, bos_token=END
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=500, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of the model that wrote the texts: other pieces, the same END."""
    folder = json_folder(
        tmp_path_factory.mktemp("writers") / "own", byte_level(vocab_size=300), eos_token=END, bos_token=END
    )
    return load_tokenizer(folder)


def judge_of(folder: Path, writer: Tokenizer, batch_size: int = 2) -> CausalJudge:
    return CausalJudge(str(folder), writer, torch.device("cpu"), batch_size)


def ids_of(text: str, writer: Tokenizer) -> list[int]:
    first, *others = (writer.encode(part) for part in text.split(END))
    return [*first, *(i for part in others for i in (writer.eos_id, *part))]


def by_hand(folder: Path, text: str) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of a text's targets, and their number."""
    backend = byte_level()
    end = backend.token_to_id(END)
    ids = backend.encode(text).ids[:LENGTH]
    filled = ids + [end] * (LENGTH - len(ids))
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    nll, count, ends = 0.0, 0, int(filled[0] == end)
    for place in range(1, LENGTH):
        ends += filled[place] == end
        if filled[place] != end or ends == 1:
            with torch.no_grad():
                log_p = model(torch.tensor([filled[:place]])).logits[0, -1].log_softmax(-1)
            nll, count = nll - log_p[filled[place]].item(), count + 1
    return nll, count


def score_texts(judge: CausalJudge, writer: Tokenizer) -> SampleScores:
    """As `score`, of texts whose ids differ in number."""
    return judge.score(np.array([ids_of(text, writer) for text in TEXTS], dtype=object))


def test_texts_keep_their_special_tokens(writer: Tokenizer) -> None:
    assert [text_of(writer, ids_of(text, writer)) for text in TEXTS] == list(TEXTS)


def test_scores_are_those_by_hand(judge_folder: Path, writer: Tokenizer) -> None:
    """Five texts two at a time: the last batch is not full, and nothing is left out."""
    judge = judge_of(judge_folder, writer)
    found = score_texts(judge, writer)
    for index, text in enumerate(TEXTS):
        nll, count = by_hand(judge_folder, text)
        assert found.targets_S[index] == count, text
        assert found.nll_S[index] == pytest.approx(nll, abs=1e-4), text
    assert found.targets_S[2] == LENGTH - 1, "cut to the judge's length"
    assert found.targets_S[3] == len(byte_level().encode(TEXTS[3]).ids), "an EOS ends a text that has none"
    assert found.targets_S[4] == 0, "a text that begins with EOS never scores one"
    total = found.nll_S.sum() / found.targets_S.sum()
    assert found.perplexity == pytest.approx(math.exp(total))


def test_ids_are_decoded_and_retokenised(judge_folder: Path, writer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    ids_SL = rng.integers(0, 256, (5, 12))
    one, three = (judge_of(judge_folder, writer, size).score(ids_SL) for size in (1, 3))
    assert (one.targets_S > 0).all() and (one.targets_S == three.targets_S).all()
    assert one.nll_S == pytest.approx(three.nll_S, rel=1e-5)
    none = judge_of(judge_folder, writer).score(ids_SL[:0])
    assert len(none.nll_S) == len(none.targets_S) == 0


def test_a_judge_is_known_by_its_weights(judge_folder: Path, writer: Tokenizer, tmp_path: Path) -> None:
    first, again = judge_of(judge_folder, writer), judge_of(judge_folder, writer, 5)
    assert first.name == again.name and first.name.startswith("gpt2-tiny-")
    model = GPT2LMHeadModel.from_pretrained(judge_folder)
    with torch.no_grad():
        model.transformer.wte.weight[7, 3] += 1e-3
    other = json_folder(tmp_path / "gpt2-tiny", byte_level(), eos_token=END, bos_token=END)
    model.save_pretrained(other)
    assert judge_of(other, writer).name != first.name


@pytest.mark.parametrize("name", ["./nowhere", "no-such-model"])
def test_no_such_judge(name: str, writer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--judge is {name}"):
        CausalJudge(name, writer, torch.device("cpu"), 2)
