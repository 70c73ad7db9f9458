"""The arguments of tools/evaluate.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from imdm_scale.config import evaluate_cli
from imdm_scale.config.evaluate_cli import parse_evaluate_arguments
from imdm_scale.diffusion import sampler
from imdm_scale.errors import UserError


def test_defaults_are_the_literatures() -> None:
    arguments = parse_evaluate_arguments(["--local_rank=1", "generate", "--model", "m"])
    assert arguments.command == "generate" and arguments.model == Path("m")
    assert (arguments.seed, arguments.temperatures, arguments.num_samples) == (42, [1.0], None)
    assert parse_evaluate_arguments(["likelihood", "--model", "m"]).data == [None]
    assert evaluate_cli.SAMPLERS == sampler.SAMPLERS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["generate"], "--model"),
        (["generate", "--model", "m", "--steps", "0"], "'0' is no whole number of at least 1"),
        (["generate", "--model", "m", "--temperatures", "0"], "'0' is no number above 0"),
        (["generate", "--model", "m", "--zero", "2"], "--zero"),
        (["generate", "--model", "m", "--step", "2"], "did you mean --steps"),
        (["likelihood", "--model", "m", "--judge", "x"], "--judge is no known flag of likelihood"),
        (["report"], "RUN"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_evaluate_arguments(words)
    assert "\n" not in str(caught.value)
