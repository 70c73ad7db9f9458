"""What tests of several folders share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed as dist

from tests.distributed.pool import PRELOAD

# The ranks of a world have one thread each; a reference with more would add up in another order.
torch.set_num_threads(1)

# No property is a matter of time, and a run of the tests can be repeated.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the fork server what to import, where tests will want it."""
    if any("distributed" in item.path.parts for item in session.items):
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


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
