"""The touches of the libraries' private names: refused for other versions, left out where CUDA is present.

What goes wrong on real ranks without them: tests/distributed/test_compat.py.
"""

from __future__ import annotations

import deepspeed
import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from imdm_scale.errors import UserError
from imdm_scale.parallel import compat

KNOWN = {"deepspeed": "0.19.8", "megatron-core": "0.16.1"}


@pytest.mark.parametrize(("package", "found"), [("deepspeed", "0.20.0"), ("megatron-core", "0.1.6")])
def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch, package: str, found: str) -> None:
    monkeypatch.setattr(compat, "version", {**KNOWN, package: found}.__getitem__)
    with pytest.raises(UserError) as refused:
        compat.prepare_libraries()
    known = compat.KNOWN_VERSIONS[package]
    assert str(refused.value) == (
        f"{package} {found} is installed, but imdm_scale's compatibility layer is written for {known}x; "
        "install it with: pip install -c constraints.txt -e ."
    )


def test_the_known_versions_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", KNOWN.__getitem__)
    compat.check_versions()


@pytest.mark.parametrize("has_cuda", [False, True])
def test_cuda_is_replaced_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    untouched = object()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "current_device", untouched)
    monkeypatch.setattr(torch.cuda, "synchronize", untouched)
    monkeypatch.setattr(schedules, "torch", torch)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    compat.prepare_libraries()
    assert (torch.cuda.current_device is untouched) == has_cuda
    assert (torch.cuda.synchronize is untouched) == has_cuda
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] == has_cuda
    assert (compat.pipeline_schedules().torch is torch) == has_cuda
    if not has_cuda:
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device == torch.device("cpu")
        assert schedules.torch.ones is torch.ones


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_copies_are_claimed_as_parts_only_in_a_pipeline(is_sharded: bool, tp_rank: int) -> None:
    whole, stage = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    compat.tag_for_grad_norm(whole, is_sharded, tp_rank, has_stages=False)
    compat.tag_for_grad_norm(stage, is_sharded, tp_rank, has_stages=True)
    assert vars(whole) == {"tensor_model_parallel": is_sharded}
    claimed = {} if is_sharded else {"model_parallel": tp_rank == 0}
    assert vars(stage) == {"tensor_model_parallel": is_sharded, **claimed}
