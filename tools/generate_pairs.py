"""Make the couplings from which im_redi learns: noisy states of data, and the texts to which a teacher leads them.

    python tools/generate_pairs.py --model DIR --out DIR --num-pairs N [--data PATH] [...]

Also over ranks (`deepspeed --num_gpus N tools/generate_pairs.py ...`, or torchrun), and as a Slurm array job, whose
tasks fill one folder together. --help explains the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imdm_scale.config.pairs_cli import parse_pairs_arguments
from imdm_scale.parallel.process import end_process_group, failures_reported, start_process_group


def main(argv: Sequence[str]) -> None:
    """Check what needs no GPU, then join the other ranks and make pairs."""
    with failures_reported():
        arguments = parse_pairs_arguments(argv)
        device = start_process_group()
        from imdm_scale.distill.pair_program import (
            make_pairs,
        )  # after the libraries are prepared for this machine

        make_pairs(arguments, device)
        end_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
