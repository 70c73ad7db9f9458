"""Write text with an exported model, in as few steps as wanted.

Example: python tools/sample.py --model runs/quickstart/student --steps 4 --prompt "It was a dark night"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from imdm_scale.diffusion.sampler import SAMPLERS
from imdm_scale.errors import UserError
from imdm_scale.evaluate.exported import tokenizer_of
from imdm_scale.hf.export import load_folder


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an exported model")
    parser.add_argument(
        "--steps", type=int, default=4, help="sampling steps: evaluations of the network (default 4)"
    )
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--num-samples", type=int, default=3, help="number of texts (default 3)")
    parser.add_argument("--length", type=int, help="tokens of a text, prompt included (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same texts (default 0)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="below 1: likelier, less varied (default 1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="nucleus: keep the likeliest tokens of this mass"
    )
    parser.add_argument(
        "--fixed-noise", action="store_true", help="keep each mask's noise over the whole text"
    )
    parser.add_argument(
        "--greedy-last-step", action="store_true", help="take the likeliest tokens in the last step"
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="where the randomness comes from (default: as the model was trained)",
    )
    return parser.parse_args(argv)


def write_texts(arguments: argparse.Namespace) -> list[str]:
    """The sampled texts.

    Raises:
        UserError: the folder holds no model, or a number is out of range.
    """
    model = load_folder(arguments.model).float()
    tokenizer = tokenizer_of(arguments.model, model.config)
    begins_with = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    try:
        ids_SL = model.generate_text(
            num_samples=arguments.num_samples,
            num_steps=arguments.steps,
            seed=arguments.seed,
            prefix_ids=[*begins_with, *tokenizer.encode(arguments.prompt)],
            length=arguments.length,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            fixed_noise=arguments.fixed_noise,
            greedy_last_step=arguments.greedy_last_step,
            sampler=arguments.sampler,
        )
    except ValueError as error:
        raise UserError(f"these texts cannot be sampled: {error}.") from None
    return [tokenizer.decode(ids_L) for ids_L in ids_SL.tolist()]


def main(argv: Sequence[str]) -> int:
    """Print the texts; returns the exit code."""
    arguments = parse_arguments(argv)
    try:
        texts = write_texts(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, markup=False)
    for number, text in enumerate(texts, 1):
        console.print(f"[{number}] {text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
