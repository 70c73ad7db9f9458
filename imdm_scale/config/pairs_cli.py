"""The arguments of tools/generate_pairs.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from imdm_scale.config.arguments import Parser, add_sharing, positive, whole
from imdm_scale.errors import UserError

PROGRAM = "python tools/generate_pairs.py"
EXAMPLES = """\
examples:
  # 512 pairs of the packaged teacher on the packaged books
  python tools/generate_pairs.py --model imdm_scale/assets/teacher --out runs/pairs --num-pairs 512 --steps 64

  # an array job: every task makes shards of one folder, the last one to end writes its manifest
  sbatch --array=0-15 --wrap "deepspeed tools/generate_pairs.py --model runs/owt/student --data data/openwebtext \\
      --out runs/pairs --num-pairs 100000"

Interrupted, the same command goes on. The pairs do not depend on the number of processes or tasks, --tp, --pp, --zero
and --batch-size. Then: tools/train.py with method.name=im_redi data.path=OUT train.init_from=MODEL."""


def parse_pairs_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a flag is missing, unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Make the couplings from which im_redi learns: noisy states, and where the teacher leads them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Which DeepSpeed's launcher puts first.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the exported teacher")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pairs")
    add("--num-pairs", type=whole(1), required=True, metavar="N", help="in the whole folder")
    add(
        "--data",
        metavar="PATH",
        help="whose train split is masked: prepared data, text, or synthetic://... (default: the packaged books)",
    )
    add(
        "--steps",
        type=whole(1),
        default=1024,
        metavar="N",
        help="of the teacher, for each pair (default: 1024)",
    )
    add("--temperature", type=positive, default=1.0, metavar="T", help="of its tokens (default: 1)")
    add(
        "--t-min",
        type=positive,
        default=1e-3,
        metavar="T",
        help="times are uniform from here to 1; with 1 all states are pure mask (default: 0.001)",
    )
    add("--seed", type=whole(0), default=1, metavar="N", help="of all draws (default: 1)")
    add("--shard-pairs", type=whole(1), default=1024, metavar="N", help="pairs of a shard (default: 1024)")
    add(
        "--batch-size", type=whole(1), default=32, metavar="N", help="at a time on each replica (default: 32)"
    )
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the network (default: fp32)")
    shares = add_sharing(parser, "the pairs do not depend on it")
    shares.add_argument(
        "--part",
        type=whole(0),
        metavar="I",
        help="which of --parts this program makes (default: Slurm's array task)",
    )
    shares.add_argument(
        "--parts", type=whole(1), metavar="N", help="programs that share the folder (default: 1)"
    )
    arguments = parser.parse_args(argv)
    if arguments.t_min > 1:
        raise UserError(f"--t-min is {arguments.t_min:g}, but a time is at most 1; give a number in (0, 1].")
    _share(arguments)
    return arguments


def _share(arguments: argparse.Namespace) -> None:
    """Takes the part from the flags, else from Slurm's array, else all of it."""
    if (arguments.part is None) != (arguments.parts is None):
        raise UserError("--part and --parts go together; give both, or none.")
    if arguments.part is None:
        first, count = os.environ.get("SLURM_ARRAY_TASK_MIN"), os.environ.get("SLURM_ARRAY_TASK_COUNT")
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        if first is None or count is None or task is None:
            arguments.part, arguments.parts = 0, 1
        else:
            step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
            arguments.part, arguments.parts = (int(task) - int(first)) // step, int(count)
    if arguments.part >= arguments.parts:
        raise UserError(
            f"--part is {arguments.part}, but of --parts {arguments.parts} the last is {arguments.parts - 1}; parts "
            "are counted from 0."
        )
