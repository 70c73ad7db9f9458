"""Plan a run without a GPU.

    python tools/plan.py layout --world-size N [--ds_config FILE.json] [--recipe FILE.yaml] [key=value ...]

layout: shows which rank is what, for student and teacher.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from imdm_scale.config.check import check_layout
from imdm_scale.config.cli import parse_plan_arguments
from imdm_scale.config.deepspeed_json import resolve_ds_config
from imdm_scale.config.layout import run_layout
from imdm_scale.config.layout_table import layout_table
from imdm_scale.config.load import DEFAULT_RECIPE, build_config, parse_override, read_json, read_recipe
from imdm_scale.config.splits import ImpossibleLayout
from imdm_scale.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one sub-command; returns the exit code, 2 for a mistake of the user's."""
    try:
        arguments = parse_plan_arguments(argv)
        COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, ImpossibleLayout) and error.near:
            print("\n  ".join(["possible, nearest first:", *error.near]), file=sys.stderr)
        return 2
    return 0


def layout(arguments: argparse.Namespace) -> None:
    """Show which rank is what."""
    recipe = arguments.recipe or DEFAULT_RECIPE
    raw = read_json(arguments.ds_config)
    config = build_config([*read_recipe(recipe), *map(parse_override, arguments.overrides)])
    check_layout(config, arguments.world_size)
    ds_config = resolve_ds_config(raw, config, arguments.world_size, arguments.ds_config, recipe)
    zero_stage = ds_config["zero_optimization"]["stage"]
    Console().print(layout_table(run_layout(config, arguments.world_size, zero_stage)))


COMMANDS = {"layout": layout}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
