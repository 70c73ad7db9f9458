"""NVIDIA's apex is told from the package of the same name on PyPI."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from imdm_scale.parallel.optimizer import apex_fused_adam


def test_apex_counts_only_where_its_fused_adam_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    assert apex_fused_adam() is None
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = type("FusedAdam", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert apex_fused_adam() is optimizers.FusedAdam
