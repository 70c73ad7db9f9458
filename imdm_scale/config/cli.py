"""The arguments of tools/train.py and of tools/plan.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from imdm_scale.config.arguments import Parser
from imdm_scale.config.help import help_text
from imdm_scale.config.nearest import did_you_mean
from imdm_scale.config.schema import settings
from imdm_scale.errors import UserError

TRAIN_FLAGS = ("--ds_config", "--recipe", "--local_rank", "--help")
PLAN_FLAGS = ("--world-size", "--ds_config", "--recipe", "--help")
DEFAULT_DS_CONFIG = Path(__file__).parents[2] / "configs" / "ds" / "zero3.json"


def parse_train_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`ds_config` (Path), `recipe` (Path or None), `local_rank` (int) and `overrides` (list of `key=value`).

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: `--ds_config` is missing, or a flag is unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(
        prog="deepspeed tools/train.py",
        usage="%(prog)s --ds_config FILE [--recipe FILE] [key=value ...]",
        description="Trains a student; writes everything under run_dir.",
        epilog=_settings_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ds_config", type=Path, metavar="FILE", help="DeepSpeed JSON, such as configs/ds/zero3.json"
    )
    _add_recipe(parser)
    parser.add_argument("--local_rank", type=int, default=0, metavar="N", help="set by the launcher")
    arguments = _with_overrides(parser, argv, TRAIN_FLAGS)
    if arguments.ds_config is None:
        raise UserError(
            "--ds_config is missing; name a DeepSpeed JSON, such as --ds_config configs/ds/zero3.json."
        )
    return arguments


def parse_plan_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`command` ("layout"), `world_size` (int), `ds_config` and `recipe` (Path or None), `overrides`.

    Args:
        argv: the words after the program's name.

    Raises:
        UserError: no sub-command, or a flag is missing, unknown or has a bad value.
        SystemExit: after `--help`.
    """
    parser = Parser(prog="tools/plan.py", description="Plans a run; needs no GPU and starts no process.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    layout = commands.add_parser(
        "layout",
        usage="%(prog)s --world-size N [--ds_config FILE] [--recipe FILE] [key=value ...]",
        help="which rank is what, for student and teacher",
        description="Shows which rank is what, for student and teacher. An impossible layout is refused with the "
        "nearest possible ones. Only what concerns the layout is checked: no path need exist yet.",
        epilog=_settings_text(
            "parallel.", "teacher.", "train.micro", "train.global", "model.size", "method.name"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    layout.add_argument("--world-size", type=_count, required=True, metavar="N", help="number of processes")
    layout.add_argument(
        "--ds_config",
        type=Path,
        default=DEFAULT_DS_CONFIG,
        metavar="FILE",
        help="DeepSpeed JSON (default: configs/ds/zero3.json)",
    )
    _add_recipe(layout)
    return _with_overrides(parser, argv, PLAN_FLAGS)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="YAML with settings (default: configs/recipes/quickstart.yaml)",
    )


def _with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str], flags: Sequence[str]
) -> argparse.Namespace:
    """The parsed flags, with the remaining words as `overrides`."""
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            raise UserError(_unknown_flag(word, flags))
    arguments.overrides = rest
    return arguments


def _settings_text(*prefixes: str) -> str:
    which = "the settings that matter here" if prefixes else "settings"
    return f"{which} for the recipe and for key=value (key, type, default):\n{help_text(prefixes=prefixes or ('',))}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes, which is 1 or more")
    return int(text)


def _unknown_flag(word: str, flags: Sequence[str]) -> str:
    flag = word.partition("=")[0]
    if flag.lstrip("-") in settings():
        return f"{flag} is a setting, not a flag; write it without dashes, as {flag.lstrip('-')}=VALUE."
    otherwise = f"the flags are {', '.join(flags)}; settings are written key=value."
    return f"{flag} is no known flag; {did_you_mean(flag, flags, otherwise)}"
