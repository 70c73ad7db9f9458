"""Generative perplexity under a causal language model of transformers, by the conventions of the literature.

As MDLM (arXiv 2406.07524) and its successors score: the samples are decoded with their special tokens as text,
tokenised again by the judge, cut to the judge's length and filled up with its EOS. `metrics.targets` says which
tokens count. No sample is left out, also where the last batch is not full.

B batch, J tokens of the judge, L positions, S samples, V the judge's vocabulary.
"""

from __future__ import annotations

import hashlib
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from imdm_scale.config.nearest import near_files
from imdm_scale.data.tokenizer import Tokenizer
from imdm_scale.errors import UserError
from imdm_scale.evaluate.judges import digest
from imdm_scale.evaluate.metrics import SampleScores, targets


class CausalJudge:
    """Any model that `AutoModelForCausalLM` loads, in float32."""

    def __init__(self, name: str, tokenizer: Tokenizer, device: torch.device, batch_size: int) -> None:
        """Loads it, once.

        Args:
            name: a local folder, or a name on the Hugging Face hub such as gpt2-large.
            tokenizer: of the model that writes the texts.
            batch_size: texts that it reads at a time; the scores do not depend on it but for rounding.

        Raises:
            UserError: there is no such model, or it has no EOS or no length.
        """
        self._tokenizer, self._device, self._batch_size = tokenizer, device, batch_size
        self._own_tokenizer, self._model = _load(name, device)
        self._eos_id = self._own_tokenizer.eos_token_id
        self._length = _length(name, self._model, self._own_tokenizer)
        self.identity: dict[str, Any] = {
            "kind": "causal",
            "name": Path(name).name,
            "weights": _weights_hash(self._model),
            "length": self._length,
            "dtype": "fp32",
        }
        self.name = f"{Path(name).name}-{digest(self.identity)}"
        self.description = f"{Path(name).name}, {self._length} tokens, fp32"

    def score(self, ids_SL: np.ndarray) -> SampleScores:
        """See `Judge.score`."""
        nll_S, targets_S = np.zeros(len(ids_SL)), np.zeros(len(ids_SL), dtype=np.int64)
        for first in range(0, len(ids_SL), self._batch_size):
            rows = slice(first, first + self._batch_size)
            texts = [text_of(self._tokenizer, ids_L) for ids_L in ids_SL[rows].tolist()]
            nll_S[rows], targets_S[rows] = self._score_texts(texts)
        return SampleScores(nll_S, targets_S)

    @torch.no_grad()
    def _score_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._own_tokenizer(texts, truncation=True, max_length=self._length)["input_ids"]
        # Filled up on the right with EOS, of which only the first can count: so one more than the longest text is
        # enough, and what a text scores does not depend on the others.
        width = max(2, min(self._length, 1 + max(map(len, encoded))))
        ids_BJ = torch.full((len(texts), width), self._eos_id)
        for row, ids in zip(ids_BJ, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        logits_BVJ = self._model(ids_BJ.to(self._device)).logits[:, :-1].float().transpose(1, 2)
        nll_BJ = F.cross_entropy(logits_BVJ, ids_BJ[:, 1:].to(self._device), reduction="none")
        counts_BJ = targets(ids_BJ.numpy(), self._eos_id)
        return np.where(counts_BJ, nll_BJ.double().cpu().numpy(), 0.0).sum(axis=1), counts_BJ.sum(axis=1)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids` with BOS and EOS spelled out, as the literature scores it.

    Where the judge spells its EOS so too (GPT-2's `<|endoftext|>`), it reads them as that.
    """
    special = {tokenizer.bos_id, tokenizer.eos_id}
    parts = []
    for is_special, group in groupby(ids, key=special.__contains__):
        run = list(group)
        parts.append("".join(map(tokenizer.token, run)) if is_special else tokenizer.decode(run))
    return "".join(parts)


def _load(name: str, device: torch.device) -> tuple[Any, torch.nn.Module]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_local = Path(name).is_dir()
    if not is_local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--judge is {name}, which is no folder; {near_files(Path(name))}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_local)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=is_local)
    except Exception as error:  # of the hub, of the files, of the configuration
        first_line = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"--judge is {name}, which transformers does not load as a causal language model "
            f"({type(error).__name__}: {first_line}); give a local folder, a name on the Hugging Face hub, or ngram."
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--judge is {name}, whose tokenizer names no EOS token, with which texts are filled up; choose another, "
            "or name it in its tokenizer_config.json."
        )
    return tokenizer, model.to(device).eval()


def _length(name: str, model: Any, tokenizer: Any) -> int:
    """Tokens that the judge reads at most: its positions, or where those are not told its tokenizer's limit."""
    length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    if length > 1 << 24:  # transformers' way to say that there is no limit
        raise UserError(f"--judge is {name}, which tells no greatest length of a text; choose another model.")
    return int(length)


def _weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the parameters as loaded, so that a name that comes to mean other weights is noticed."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(memoryview(parameter.detach().cpu().contiguous().numpy()).cast("B"))
    return sha.hexdigest()
