"""What the command lines of all tools share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, so that one rank reports them once."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"Command line: {message}; --help shows the usage.")


class Commands:
    """The commands of a program, each with flags, a usage and examples of its own.

    Args:
        parser: the program's, whose `prog` is how it is called.
    """

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self._subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        self._parsers: dict[str, argparse.ArgumentParser] = {}

    def add(
        self, name: str, usage: str, short: str, examples: str, long: str | None = None
    ) -> argparse.ArgumentParser:
        """Declares a command; what comes back takes its flags.

        Args:
            usage: its flags, for the first line of the help.
            short: what it does, for the program's help.
            long: the same, for its own help; None is `short` as a sentence.
        """
        self._parsers[name] = self._subparsers.add_parser(
            name,
            usage=f"{self.parser.prog} {name} {usage}",
            help=short,
            description=long or f"{short[0].upper()}{short[1:]}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return self._parsers[name]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """`command` and that command's own arguments.

        Raises:
            UserError: no command, or a flag is missing, unknown or has a bad value.
            SystemExit: after `--help`.
        """
        arguments, rest = self.parser.parse_known_args(argv)
        if rest:
            raise UserError(unknown_word(rest[0], arguments.command, self._parsers[arguments.command]))
        return arguments


def whole(smallest: int) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `smallest` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {smallest}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """A type of arguments: finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def add_sharing(parser: argparse.ArgumentParser, remark: str) -> argparse._ArgumentGroup:
    """Adds how the ranks share a network that only computes: `--tp`, `--pp` and `--zero`; returns their group."""
    group = parser.add_argument_group(f"how the ranks share the work ({remark})")
    group.add_argument("--tp", type=whole(1), default=1, metavar="N", help="tensor parallel (default: 1)")
    group.add_argument("--pp", type=whole(1), default=1, metavar="N", help="pipeline parallel (default: 1)")
    group.add_argument(
        "--zero", type=int, choices=(0, 3), default=0, help="ZeRO stage of the weights (default: 0)"
    )
    return group


def unknown_word(word: str, command: str, parser: argparse.ArgumentParser) -> str:
    """What to say of a word that `command` does not know."""
    if not word.startswith("-"):
        return f"{command} has no use for the word {word!r}; --help shows the usage."
    flag = word.partition("=")[0]
    flags = re.findall(r"^  (--[\w-]+)", parser.format_help(), flags=re.MULTILINE)
    otherwise = f"its flags are {', '.join(flags)}."
    return f"{flag} is no known flag of {command}; {did_you_mean(flag, flags, otherwise)}"
