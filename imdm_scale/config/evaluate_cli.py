"""The arguments of tools/evaluate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imdm_scale.config.arguments import Commands, Parser, add_sharing, positive, whole

PROGRAM = "python tools/evaluate.py"
SAMPLERS = ("ancestral", "coupled", "coupled_argmax")

GENERATE_EXAMPLES = """\
examples:
  # the packaged teacher under the judge that ships with the package
  python tools/evaluate.py generate --model imdm_scale/assets/teacher --num-samples 256

  # as in the literature: 1024 samples under GPT-2 large, and the frontier over temperatures
  deepspeed tools/evaluate.py generate --model runs/owt/student --data data/openwebtext --judge gpt2-large \\
      --steps 1 2 4 8 16 --temperatures 0.7 0.8 0.9 1.0

  # continuations of real texts, with MAUVE
  deepspeed tools/evaluate.py generate --model runs/owt/student --data data/openwebtext --judge gpt2-large \\
      --prefixes 256 --mauve --out runs/owt/conditional

Interrupted, the same command goes on. Samples are kept: another --judge scores them again, more --num-samples add to
them. The samples do not depend on the number of processes, --tp, --pp, --zero and --batch-size."""

LIKELIHOOD_EXAMPLES = """\
examples:
  python tools/evaluate.py likelihood --model runs/quickstart/student --draws 16
  deepspeed tools/evaluate.py likelihood --model runs/owt/student --data data/openwebtext wikitext.txt lambada.jsonl

Text without a validation split of its own is taken as a whole. Interrupted, the same command goes on."""

REPORT_EXAMPLES = """\
example:
  python tools/evaluate.py report runs/quickstart runs/coupled --out report

RUN is the --out of an evaluation, or the folder of a training run that has evaluations in it."""


def parse_evaluate_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`command` (generate, likelihood or report) and that command's own arguments.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: no command, or a flag is missing, unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(prog=PROGRAM, description="How good is a model? Scores with their uncertainty.")
    # Which DeepSpeed's launcher puts first.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    commands = Commands(parser)
    _add_generate(
        commands.add(
            "generate",
            "--model DIR [...]",
            "sample and score: generative perplexity, entropy, their frontier, diversity, MAUVE",
            GENERATE_EXAMPLES,
        )
    )
    _add_likelihood(
        commands.add(
            "likelihood",
            "--model DIR [--data PATH ...] [...]",
            "the likelihood bound on validation and zero-shot text",
            LIKELIHOOD_EXAMPLES,
        )
    )
    _add_report(
        commands.add(
            "report", "RUN [RUN ...] [--out DIR]", "one page that compares evaluations", REPORT_EXAMPLES
        )
    )
    return commands.parse(argv)


def _add_model(parser: argparse.ArgumentParser, samples: str) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of an exported model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: evaluation-NAME beside the model of a run, else below runs/)",
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=32,
        metavar="N",
        help=f"{samples} at a time on each replica (default: 32)",
    )
    parser.add_argument("--seed", type=whole(0), default=42, metavar="N", help="of all draws (default: 42)")
    add_sharing(parser, "the results do not depend on it")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the network (default: fp32)"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "texts sampled")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--steps",
        type=whole(1),
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="network evaluations a text (default: 1 2 4 8 16 32)",
    )
    sampling.add_argument(
        "--temperatures",
        type=positive,
        nargs="+",
        default=[1.0],
        metavar="T",
        help="of the token distribution; several make a frontier (default: 1)",
    )
    sampling.add_argument(
        "--num-samples", type=whole(1), metavar="N", help="texts for each of them (default: 1024)"
    )
    sampling.add_argument("--sampler", choices=SAMPLERS, help="(default: as the model was trained)")
    score = parser.add_argument_group("scoring")
    score.add_argument(
        "--judge",
        default="ngram",
        metavar="ngram|NAME_OR_DIR",
        help="ngram (fitted to the data's train split), or a causal model of transformers: a local folder, or a name "
        "such as gpt2-large (default: ngram)",
    )
    score.add_argument(
        "--judge-batch-size", type=whole(1), default=8, metavar="N", help="texts at a time (default: 8)"
    )
    score.add_argument(
        "--data",
        metavar="PATH",
        help="real text to compare with: prepared data, text, or synthetic://... with the task's own measures "
        "(default: the packaged books)",
    )
    score.add_argument(
        "--data-tokens",
        type=whole(1),
        default=4_000_000,
        metavar="N",
        help="to which the n-gram judge is fitted, at most (default: 4000000)",
    )
    score.add_argument("--mauve", action="store_true", help="also MAUVE, by the package mauve-text")
    score.add_argument(
        "--mauve-model",
        default="gpt2-large",
        metavar="NAME_OR_DIR",
        help="whose features it compares (default: gpt2-large)",
    )
    conditional = parser.add_argument_group("continuations of real text")
    conditional.add_argument(
        "--prefixes", type=whole(1), metavar="N", help="beginnings of so many validation blocks"
    )
    conditional.add_argument(
        "--prefix-length", type=whole(1), metavar="N", help="tokens of each, BOS included (default: 50)"
    )
    conditional.add_argument(
        "--continuations", type=whole(1), metavar="N", help="texts for each (default: 5)"
    )
    conditional.add_argument(
        "--text-length",
        type=whole(2),
        metavar="N",
        help="tokens of a text that are scored, prefix included (default: 100)",
    )


def _add_likelihood(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "blocks computed")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[None],
        metavar="PATH",
        help="prepared data or text, each a figure (default: the packaged books)",
    )
    parser.add_argument(
        "--draws", type=whole(1), default=8, metavar="K", help="of (t, x_t, e) for each block (default: 8)"
    )
    parser.add_argument(
        "--max-blocks", type=whole(1), metavar="N", help="the first N blocks of each (default: all)"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an evaluation, or a training run")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the page (default: report)"
    )
    parser.add_argument(
        "--texts",
        type=whole(0),
        default=3,
        metavar="N",
        help="samples of each run, side by side (default: 3)",
    )
