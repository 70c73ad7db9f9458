"""The arguments of tools/train.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from imdm_scale.config.help import help_text
from imdm_scale.config.nearest import did_you_mean
from imdm_scale.config.schema import settings
from imdm_scale.errors import UserError

FLAGS = ("--ds_config", "--recipe", "--local_rank", "--help")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, so that one rank reports them once."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"Command line: {message}; --help shows the usage.")


def parse_train_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`ds_config` (Path), `recipe` (Path or None), `local_rank` (int) and `overrides` (list of `key=value`).

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: `--ds_config` is missing, or a flag is unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = _Parser(
        prog="deepspeed tools/train.py",
        usage="%(prog)s --ds_config FILE [--recipe FILE] [key=value ...]",
        description="Trains a student; writes everything under run_dir.",
        epilog=f"settings for the recipe and for key=value (key, type, default):\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ds_config", type=Path, metavar="FILE", help="DeepSpeed JSON, such as configs/ds/zero3.json"
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="YAML with settings (default: configs/recipes/quickstart.yaml)",
    )
    parser.add_argument("--local_rank", type=int, default=0, metavar="N", help="set by the launcher")
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            raise UserError(_unknown_flag(word))
    if arguments.ds_config is None:
        raise UserError(
            "--ds_config is missing; name a DeepSpeed JSON, such as --ds_config configs/ds/zero3.json."
        )
    arguments.overrides = rest
    return arguments


def _unknown_flag(word: str) -> str:
    flag = word.partition("=")[0]
    if flag.lstrip("-") in settings():
        return f"{flag} is a setting, not a flag; write it without dashes, as {flag.lstrip('-')}=VALUE."
    otherwise = f"the flags are {', '.join(FLAGS)}; settings are written key=value."
    return f"{flag} is no known flag; {did_you_mean(flag, FLAGS, otherwise)}"
