"""MAUVE (Pillutla et al., arXiv 2102.01454), by the authors' package `mauve-text`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from imdm_scale.errors import UserError

SEEDS = (42, 43, 44, 45, 46)
"""Of its clustering; the literature gives the mean over these five."""


@dataclass(frozen=True)
class Mauve:
    """The mean over seeds, and the standard deviation between them, which says nothing of the texts' number."""

    value: float
    deviation: float


class MauveScorer:
    """Compares samples with human texts; the features of these are computed once.

    Args:
        human: texts of people.
        features: causal model of transformers whose last hidden state is compared: a folder or a name.
        max_length: tokens of it that a text is cut to.
        device: number of a GPU, -1 for the CPU.

    Raises:
        UserError: the package is not installed, or cannot load the model.
    """

    def __init__(self, human: list[str], features: str, max_length: int, device: int) -> None:
        # The package's function hides the module of the same name, which alone gives the features.
        self._package = load_package("mauve.compute_mauve")
        self._of_texts = {
            "featurize_model_name": features,
            "max_len": max_length,
            "device_id": device,
            "batch_size": 1,
        }
        try:
            self._human = self._features(human, "human")
        except (ValueError, OSError) as error:
            raise UserError(
                f"--mauve-model is {features}, which mauve-text does not load ({str(error).splitlines()[0]}); "
                "give gpt2-large, or a local folder with gpt2 or bert in its path."
            ) from None

    def score(self, sampled: list[str]) -> Mauve:
        """How close the texts' law is to the human ones': 1 where they cannot be told apart."""
        features = self._features(sampled, "sampled")
        scores = [
            self._package.compute_mauve(self._human, features, seed=seed, verbose=False).mauve
            for seed in SEEDS
        ]
        return Mauve(float(np.mean(scores)), float(np.std(scores, ddof=1)))

    def _features(self, texts: list[str], name: str) -> np.ndarray:
        return self._package.get_features_from_input(None, None, texts, name=name, **self._of_texts)


def load_package(module: str = "mauve") -> Any:
    """A module of the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--mauve needs the package mauve-text, which cannot be imported ({error}); install it with "
            "pip install 'imdm_scale[eval]', or leave --mauve out."
        ) from None
