"""The arguments of tools/convert.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imdm_scale.config.arguments import Commands, Parser, positive, whole

PROGRAM = "python tools/convert.py"
MAX_SHARD_SIZE = "5GB"
MODEL_HELP = "folder of an exported model or of a run, a checkpoint, or a name on the hub"

FROM_REFERENCE_EXAMPLES = """\
examples:
  # a checkpoint of MDLM's trainer: the averaged weights, which its authors evaluate
  python tools/convert.py from-reference --checkpoint mdlm.ckpt --ema --tokenizer gpt2 --out models/mdlm

  # a folder of the hub, downloaded beforehand
  python tools/convert.py from-reference --checkpoint mdlm-owt --tokenizer gpt2 --dtype bf16 --out models/mdlm

The folder is a teacher (teacher.path=models/mdlm) and loads with transformers. Nothing in a file is executed."""

TO_REFERENCE_EXAMPLES = """\
example:
  python tools/convert.py to-reference --model runs/owt/student --out student.pt

The state dict loads into the reference's training module, module.load_state_dict(torch.load("student.pt")), with strict
loading, or without the prefix `backbone.` into its DIT."""

TO_HF_EXAMPLES = """\
examples:
  # the averaged weights of a run's newest whole checkpoint
  python tools/convert.py to-hf --checkpoint runs/owt --out models/imdm

  # one checkpoint's weights as they were trained, in files of at most a gigabyte
  python tools/convert.py to-hf --checkpoint runs/owt/checkpoints/step-00010000 --raw --max-shard-size 1GB --out raw

Whatever layout wrote the checkpoint, one process without a GPU reads it, one tensor at a time."""

FROM_HF_EXAMPLES = """\
example:
  python tools/convert.py from-hf --model models/mdlm --tp 4 --pp 2 --out models/mdlm-tp4-pp2
  deepspeed tools/train.py --ds_config configs/ds/zero3.json teacher.path=models/mdlm-tp4-pp2 ...

Each rank of that layout reads files of its own; any other layout can read them, too."""

FROM_LLADA_EXAMPLES = """\
example:
  hf download GSAI-ML/LLaDA-8B-Base --local-dir llada
  python tools/convert.py from-llada --model llada --out models/llada"""

TO_LLADA_EXAMPLES = """\
example:
  python tools/convert.py to-llada --model models/llada --like llada --out llada-again"""

INSPECT_EXAMPLES = """\
examples:
  python tools/convert.py inspect runs/owt
  python tools/convert.py verify runs/owt/checkpoints/step-00010000
  python tools/convert.py diff runs/owt/checkpoints/step-00010000 runs/other/checkpoints/step-00010000"""

PUSH_EXAMPLES = """\
example:
  hf auth login
  python tools/convert.py push --model runs/owt/student --repo me/imdm-owt --private"""


def parse_convert_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`command` and that command's own arguments.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: no command, or a flag is missing, unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(prog=PROGRAM, description="Converts models between formats; checks each by its logits.")
    commands = Commands(parser)
    _add_from_reference(
        commands.add(
            "from-reference",
            "--checkpoint PATH --out DIR [...]",
            "a checkpoint of MDLM, SDTT or IMDM as an exported model",
            FROM_REFERENCE_EXAMPLES,
        )
    )
    _add_to_reference(
        commands.add(
            "to-reference",
            "--model DIR --out FILE [--no-check]",
            "an exported model as a state dict of the reference networks",
            TO_REFERENCE_EXAMPLES,
        )
    )
    _add_to_hf(
        commands.add(
            "to-hf",
            "--checkpoint RUN_OR_CHECKPOINT --out DIR [...]",
            "a run's checkpoint as an exported model",
            TO_HF_EXAMPLES,
        )
    )
    _add_from_hf(
        commands.add(
            "from-hf",
            "--model MODEL --out DIR --tp T --pp P [--no-check]",
            "an exported model as a checkpoint that is cut for a layout",
            FROM_HF_EXAMPLES,
        )
    )
    _add_from_llada(
        commands.add(
            "from-llada",
            "--model DIR --out DIR [...]",
            "a folder of LLaDA as an exported model",
            FROM_LLADA_EXAMPLES,
        )
    )
    _add_to_llada(
        commands.add(
            "to-llada", "--model MODEL --out DIR [...]", "a model as a folder of LLaDA", TO_LLADA_EXAMPLES
        )
    )
    _add_path(commands.add("inspect", "DIR", "what the checkpoints of a run hold", INSPECT_EXAMPLES))
    _add_path(commands.add("verify", "DIR", "whether the checkpoints of a run are whole", INSPECT_EXAMPLES))
    _add_two(
        commands.add(
            "diff", "FIRST SECOND", "how two checkpoints differ; exit code 1 if they do", INSPECT_EXAMPLES
        )
    )
    _add_push(
        commands.add(
            "push",
            "--model DIR --repo OWNER/NAME [...]",
            "upload an exported model to the Hugging Face hub",
            PUSH_EXAMPLES,
        )
    )
    return commands.parse(argv)


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Adds how an exported folder is written: `--dtype` and `--max-shard-size`."""
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="type of the stored weights (default: as in the source)"
    )
    parser.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help=f"bytes of a file of weights, such as 200MB; more are dealt to several (default: {MAX_SHARD_SIZE})",
    )


def add_check(parser: argparse.ArgumentParser) -> None:
    """Adds `--no-check`."""
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the logits of source and result"
    )


def _add_from_reference(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="Lightning .ckpt, state dict (.pt, .pth, .bin, .safetensors), or a folder of the hub",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the exported model")
    add("--ema", action="store_true", help="take the averaged weights of a Lightning checkpoint")
    add("--num-heads", type=whole(1), metavar="N", help="(default: as the rotary buffer says)")
    add("--softcap", type=positive, metavar="C", help="bound of attention scores (default: as the file says)")
    add("--length", type=whole(2), metavar="L", help="tokens of a block (default: as the file says, or 1024)")
    add(
        "--tokenizer",
        metavar="PATH",
        help="which is written beside the model and names the mask: a folder, a file, or a name on the hub "
        "(default: the checkpoint folder's own, or none)",
    )
    add_writing(parser)
    add_check(parser)


def _add_to_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of an exported model"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a .pt, .pth, .bin or .safetensors file"
    )
    add_check(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of an exported model")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository, which is made if need be")
    add("--private", action="store_true", help="make it a private one")
    add("--revision", metavar="BRANCH", help="branch, which is made if need be (default: the main one)")


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's folder, or one of its checkpoints",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the exported model")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--ema", action="store_true", help="the averaged weights (default, where there are any)"
    )
    weights.add_argument("--raw", action="store_true", help="the weights as they were trained")
    add_writing(parser)
    add_check(parser)


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the checkpoint, which must not exist",
    )
    add("--tp", type=whole(1), required=True, metavar="T", help="tensor-parallel size")
    add("--pp", type=whole(1), required=True, metavar="P", help="pipeline-parallel size")
    add_check(parser)


def _add_from_llada(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of LLaDA's files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the exported model")
    add_writing(parser)
    add_check(parser)


def _add_to_llada(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of LLaDA's files, new or empty")
    add("--like", type=Path, metavar="DIR", help="a LLaDA folder whose tokenizer and code are copied")
    add_writing(parser)
    add_check(parser)


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR", help="a run's folder, or one of its checkpoints")


def _add_two(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="FIRST", help="a checkpoint")
    parser.add_argument("second", type=Path, metavar="SECOND", help="another, of any layout")
