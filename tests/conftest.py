"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

# The ranks of a world have one thread each; a reference with more would add up in another order.
torch.set_num_threads(1)

# No property is a matter of time, and a run of the tests can be repeated.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def world_of_one() -> Iterator[None]:
    """This process as a world of its own: what Megatron-core's modules need to exist.

    Made without the launcher's environment variables, which programs started by other tests would inherit.
    """
    from imdm_scale.parallel.compat import prepare_libraries

    prepare_libraries()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
