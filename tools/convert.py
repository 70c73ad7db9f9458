"""Convert models: from and to the reference implementations' checkpoints, and to the Hugging Face hub.

    python tools/convert.py from-reference --checkpoint PATH --out DIR [...]
    python tools/convert.py to-reference --model DIR --out FILE
    python tools/convert.py push --model DIR --repo OWNER/NAME

Each command explains itself with --help; docs/conversion.md has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from imdm_scale.config.convert_cli import parse_convert_arguments
from imdm_scale.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code, 2 for a mistake of the user's or a conversion that fails its check."""
    try:
        arguments = parse_convert_arguments(argv)
        COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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


def push(arguments: argparse.Namespace) -> None:
    """Exported model -> the hub."""
    from imdm_scale.hf.push import push_folder

    print(
        push_folder(arguments.model, arguments.repo, private=arguments.private, revision=arguments.revision)
    )


COMMANDS = {"from-reference": from_reference, "to-reference": to_reference, "push": push}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
