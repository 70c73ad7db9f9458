"""How good is a model? Scores with their uncertainty, under any layout.

    python tools/evaluate.py generate --model DIR ...
    python tools/evaluate.py likelihood --model DIR --data PATH ...
    python tools/evaluate.py report RUN ...

The first two also over ranks: `deepspeed --num_gpus N tools/evaluate.py ...`, or torchrun. Each command explains
itself with --help; docs/evaluation.md has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from imdm_scale.config.evaluate_cli import parse_evaluate_arguments
from imdm_scale.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code, 2 for a mistake of the user's."""
    if "report" in argv[:1]:
        try:
            return report(parse_evaluate_arguments(argv))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    over_ranks(argv)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """One page; needs neither ranks nor a network."""
    from imdm_scale.evaluate.report import write_report

    print(f"report written to {write_report(arguments.runs, arguments.out, arguments.texts)}")
    return 0


def over_ranks(argv: Sequence[str]) -> None:
    """Join the other ranks and evaluate with them."""
    from imdm_scale.parallel.process import end_process_group, failures_reported, start_process_group

    with failures_reported():
        arguments = parse_evaluate_arguments(argv)
        device = start_process_group()
        # After the libraries are prepared for this machine.
        from imdm_scale.distill.bounds import bounds
        from imdm_scale.distill.evaluation import open_evaluation
        from imdm_scale.distill.generation import generate

        command = {"generate": generate, "likelihood": bounds}[arguments.command]
        with open_evaluation(arguments, ["tools/evaluate.py", *argv], device) as evaluation:
            command(evaluation, arguments)
        end_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
