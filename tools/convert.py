"""Convert models and look into checkpoints.

    python tools/convert.py to-hf          --checkpoint RUN --out DIR     a run's weights as an exported model
    python tools/convert.py from-hf        --model DIR --out DIR --tp T --pp P
    python tools/convert.py from-reference --checkpoint PATH --out DIR    MDLM, SDTT, IMDM
    python tools/convert.py to-reference   --model DIR --out FILE
    python tools/convert.py from-llada     --model DIR --out DIR
    python tools/convert.py to-llada       --model DIR --out DIR
    python tools/convert.py push           --model DIR --repo OWNER/NAME
    python tools/convert.py inspect | verify DIR
    python tools/convert.py diff FIRST SECOND

Each command explains itself with --help; docs/conversion.md has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from imdm_scale.config.convert_cli import parse_convert_arguments
from imdm_scale.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 2 for a mistake of the user's, for damage or a conversion that fails its
    check, 1 where `diff` sees a difference."""
    try:
        arguments = parse_convert_arguments(argv)
        return COMMANDS[arguments.command](arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def from_reference(arguments: argparse.Namespace) -> None:
    """MDLM, SDTT or IMDM -> exported model."""
    from imdm_scale.checkpoint.from_reference import Choices, from_reference

    choices = Choices(
        averaged=arguments.ema,
        num_heads=arguments.num_heads,
        softcap=arguments.softcap,
        length=arguments.length,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        check=not arguments.no_check,
    )
    from_reference(arguments.checkpoint, arguments.out, choices, print)


def to_reference(arguments: argparse.Namespace) -> None:
    """Exported model -> state dict of the reference networks."""
    from imdm_scale.checkpoint.write_reference import to_reference

    to_reference(arguments.model, arguments.out, not arguments.no_check, print)


def to_hf(arguments: argparse.Namespace) -> None:
    """A run's checkpoint -> exported model."""
    from imdm_scale.checkpoint.manifest import AVERAGE, MASTER
    from imdm_scale.checkpoint.to_hf import to_hf

    to_hf(
        arguments.checkpoint,
        arguments.out,
        kind=AVERAGE if arguments.ema else MASTER if arguments.raw else None,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        check=not arguments.no_check,
        say=print,
    )


def from_hf(arguments: argparse.Namespace) -> None:
    """Exported model -> checkpoint of a layout."""
    from imdm_scale.checkpoint.from_hf import from_hf

    from_hf(arguments.model, arguments.out, arguments.tp, arguments.pp, not arguments.no_check, print)


def from_llada(arguments: argparse.Namespace) -> None:
    """LLaDA -> exported model."""
    from imdm_scale.checkpoint.llada_conversion import from_llada

    from_llada(
        arguments.model,
        arguments.out,
        arguments.dtype,
        arguments.max_shard_size,
        not arguments.no_check,
        print,
    )


def to_llada(arguments: argparse.Namespace) -> None:
    """Model -> LLaDA."""
    from imdm_scale.checkpoint.llada_conversion import to_llada

    to_llada(
        arguments.model,
        arguments.out,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.like,
        not arguments.no_check,
        print,
    )


def inspect(arguments: argparse.Namespace) -> None:
    """Tables of what checkpoints hold."""
    from rich.console import Console

    from imdm_scale.checkpoint.inspection import inspect

    Console().print(*inspect(arguments.path))


def verify(arguments: argparse.Namespace) -> None:
    """Checkpoints against their manifests."""
    from imdm_scale.checkpoint.inspection import verify

    verify(arguments.path, print)


def diff(arguments: argparse.Namespace) -> int:
    """One checkpoint against another."""
    from imdm_scale.checkpoint.inspection import diff

    differs = 0
    for line in diff(arguments.first, arguments.second):
        print(line)
        differs = 1
    return differs


def push(arguments: argparse.Namespace) -> None:
    """Exported model -> the hub."""
    from imdm_scale.hf.push import push_folder

    print(
        push_folder(arguments.model, arguments.repo, private=arguments.private, revision=arguments.revision)
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "to-hf": to_hf,
    "from-hf": from_hf,
    "from-reference": from_reference,
    "to-reference": to_reference,
    "from-llada": from_llada,
    "to-llada": to_llada,
    "push": push,
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
