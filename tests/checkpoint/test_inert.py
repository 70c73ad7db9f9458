"""Files of torch.save are read without running anything that they name."""

from __future__ import annotations

import collections
import functools
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from imdm_scale.checkpoint.inert import Inert, load_inert, plain
from imdm_scale.errors import UserError
from tests.checkpoint.references import lightning, reference


class Attack:
    """Calls a function with an argument when it is unpickled by pickle itself."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("function", [exec, eval, __import__, functools.partial, getattr])
def test_a_malicious_pickle_executes_nothing(tmp_path: Path, function: object) -> None:
    mark = tmp_path / "run"
    code = f"open({str(mark)!r}, 'w')"
    torch.save({"weight": torch.ones(2), "x": Attack(function, code)}, tmp_path / "file.pt")
    content = load_inert(tmp_path / "file.pt")
    assert isinstance(content["x"], Inert) and content["x"].arguments == (code,)
    assert torch.equal(content["weight"], torch.ones(2))
    assert not mark.exists()


def test_what_calls_the_system_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    torch.save({"x": Attack(os.system, f"touch {mark}")}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"wants posix\.system to be called.*nothing of it was run"):
        load_inert(tmp_path / "file.pt")
    assert not mark.exists()
    # The attack works where a file is trusted.
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert mark.exists()


def test_a_called_result_is_not_called_again(tmp_path: Path) -> None:
    """`getattr(x, "y")(...)`: the result of an inert call is no function."""
    stream = (
        b"\x80\x02cbuiltins\ngetattr\n"  # a function, made inert
        b"X\x01\x00\x00\x00aX\x05\x00\x00\x00upper\x86R"  # called: an Inert
        b")R."  # called itself
    )
    path = tmp_path / "file.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, stream if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match="cannot be read"):
        load_inert(path)


def test_settings_are_read_out_of_objects_that_cannot_be_imported(tmp_path: Path) -> None:
    config = {"time_conditioning": True, "model": {"length": 128, "softcap": -1.0}}
    content = load_inert(lightning(tmp_path / "last.ckpt", reference(), config))
    assert plain(content["hyper_parameters"]) == {"config": config, "tokenizer": None}


def test_settings_are_read_out_of_omegaconf(tmp_path: Path) -> None:
    config = OmegaConf.create({"a": {"b": [1, None, "x"]}, "c": True, "d": "${a.b}"})
    torch.save({"config": config, "more": collections.defaultdict(dict, e=2)}, tmp_path / "file.pt")
    content = plain(load_inert(tmp_path / "file.pt"))
    assert content == {"config": {"a": {"b": [1, None, "x"]}, "c": True, "d": "${a.b}"}, "more": {"e": 2}}


def test_files_of_old_torch_and_other_files(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_inert(tmp_path / "old.pt")["w"], torch.ones(2))
    mark = tmp_path / "run"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Attack(os.system, f"touch {mark}"), protocol=2))
    torch.save(
        Attack(exec, f"open({str(mark)!r}, 'w')"),
        tmp_path / "attack.pt",
        _use_new_zipfile_serialization=False,
    )
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    for name in ("plain.pkl", "attack.pt", "script.pt", "text.pt", "empty.pt", "nowhere.pt"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a checkpoint of torch") as caught:
            load_inert(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not mark.exists()
