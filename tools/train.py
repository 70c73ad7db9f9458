"""Train or distil a masked diffusion language model.

    deepspeed tools/train.py --ds_config configs/ds/zero3.json [--recipe FILE.yaml] [key=value ...]

With no other argument: the quickstart, which distils the teacher that ships with the package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from imdm_scale.config.cli import parse_train_arguments
from imdm_scale.config.load import load_config
from imdm_scale.parallel.process import end_process_group, failures_reported, start_process_group, world_size


def main(argv: Sequence[str]) -> None:
    """Check everything that needs no GPU, then join the other ranks and train."""
    with failures_reported():
        arguments = parse_train_arguments(argv)
        config, ds_config = load_config(
            arguments.recipe, arguments.overrides, arguments.ds_config, world_size()
        )
        device = start_process_group()
        from imdm_scale.distill.run import run  # after the libraries are prepared for this machine

        run(config, ds_config, device, [__file__, *argv])
        end_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
