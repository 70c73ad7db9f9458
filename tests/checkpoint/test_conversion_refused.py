"""What cannot be converted is refused in one sentence, by tools/convert.py, with exit code 2."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imdm_scale.checkpoint import self_check
from imdm_scale.config import convert_cli
from imdm_scale.config.convert_cli import parse_convert_arguments
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.hf import shard_files
from imdm_scale.hf.export import load_folder, save_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.checkpoint.references import averages, lightning, module_state, reference
from tests.small_tokenizers import bert_folder
from tests.tiny import plain_network, tiny


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs tools/convert.py and gives what it says of a mistake."""
    path = Path(__file__).parents[2] / "tools" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> str:
        code = module.main([str(word) for word in words])
        said = capsys.readouterr()
        assert code == (2 if said.err else 0)
        assert said.err.count("\n") == (1 if said.err else 0)
        return said.err or said.out

    return run


def test_the_tool_converts_there_and_back(tool: Callable[..., str], tmp_path: Path) -> None:
    torch.save(module_state(reference()), tmp_path / "a.pt")
    said = tool("from-reference", "--checkpoint", tmp_path / "a.pt", "--out", tmp_path / "out", "--no-check")
    assert f"written to {tmp_path / 'out'} as float32" in said and "checked" not in said
    said = tool("to-reference", "--model", tmp_path / "out", "--out", tmp_path / "back.pt")
    assert "checked: logits differ by at most" in said


def test_a_tokenizer_names_the_mask_and_travels(tool: Callable[..., str], tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    tokenizer = load_tokenizer(folder)
    for vocab_size in (tokenizer.vocab_size, tokenizer.vocab_size + 1):
        torch.save(module_state(reference(vocab_size=vocab_size)), tmp_path / f"{vocab_size}.pt")
    words = ("--out", tmp_path / "out", "--tokenizer", folder)
    said = tool("from-reference", "--checkpoint", tmp_path / f"{tokenizer.vocab_size + 1}.pt", *words)
    assert f"--tokenizer has {tokenizer.vocab_size} ids" in said and not (tmp_path / "out").exists()
    said = tool("from-reference", "--checkpoint", tmp_path / f"{tokenizer.vocab_size}.pt", *words)
    assert "mask token" not in said
    config = load_folder(tmp_path / "out").config
    assert (config.mask_token_id, config.bos_token_id) == (tokenizer.mask_id, tokenizer.bos_id)
    assert load_tokenizer(tmp_path / "out").fingerprint == config.tokenizer_fingerprint
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"time_conditioning": True}, "was trained with time_conditioning, so its adaLN depends"),
        ({"algo": {"time_conditioning": True}}, "was trained with time_conditioning"),
        (
            {"time_conditioning": "${algo.time_conditioning}", "algo": {"time_conditioning": True}},
            "was trained with time_conditioning",
        ),
        ({"parameterization": "sedd"}, "the parameterization sedd; only subs"),
        ({"model": {"n_heads": 8}}, "--num-heads is 8, but the checkpoint's"),
        ({"model": {"length": "long"}}, "model.length is 'long' in the settings"),
    ],
)
def test_networks_of_another_kind(tool: Callable[..., str], tmp_path: Path, config: dict, said: str) -> None:
    file = lightning(tmp_path / "a.ckpt", reference(), config)
    assert said in tool("from-reference", "--checkpoint", file, "--out", tmp_path / "out")
    (tmp_path / "hub").mkdir()
    torch.save(module_state(reference()), tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert said in tool("from-reference", "--checkpoint", tmp_path / "hub", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--length", 30), "--length is 30, but .* was trained with 20; leave --length out"),
        (("--softcap", 3), "--softcap is 3, but .* was trained with 2"),
        (("--num-heads", 2), "--num-heads is 2, but .* was trained with 4"),
        (("--max-shard-size", "big"), "max_shard_size is 'big'"),
        (("--dtype", "fp16"), "--dtype"),
        (("--emma",), "--emma is no known flag of from-reference; did you mean --ema"),
    ],
)
def test_flags_that_contradict_the_file(
    tool: Callable[..., str], tmp_path: Path, flags: tuple, said: str
) -> None:
    config = {"model": {"length": 20, "softcap": 2.0, "n_heads": 4}}
    file = lightning(tmp_path / "a.ckpt", reference(), config)
    message = tool("from-reference", "--checkpoint", file, "--out", tmp_path / "out", *flags)
    assert re.search(said, message)


def test_averages_of_another_network(tool: Callable[..., str], tmp_path: Path) -> None:
    network = reference()
    shadow = averages(network)
    for name, wrong, said in (
        ("none", None, "has no averaged weights"),
        ("short", shadow[:-1], "averaged tensors for"),
        ("long", [*shadow, torch.ones(2)], "averaged tensors for"),
        (
            "swapped",
            [shadow[1], shadow[0], *shadow[2:]],
            "in the place of vocab_embed.embedding has the shape",
        ),
    ):
        ema = {"ema": None if wrong is None else {"shadow_params": wrong}}
        file = lightning(tmp_path / f"{name}.ckpt", network, **ema)
        assert said in tool("from-reference", "--checkpoint", file, "--out", tmp_path / "out", "--ema")
    torch.save(module_state(network), tmp_path / "bare.pt")
    said = tool("from-reference", "--checkpoint", tmp_path / "bare.pt", "--out", tmp_path / "out", "--ema")
    assert "has no averaged weights" in said


def test_files_that_are_no_checkpoints(tool: Callable[..., str], tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.ckpt").write_text("nothing")
    (tmp_path / "text.safetensors").write_text("nothing")
    (tmp_path / "empty").mkdir()
    model = plain_network(tiny())
    save_folder(model, model.config, tmp_path / "ours")
    for name, said in (
        ("list.pt", "holds a list where a state dict is wanted"),
        ("epoch.pt", "is no state dict: its epoch is no tensor"),
        ("other.pt", "has no tensor sigma_map.mlp.0.weight"),
        ("text.ckpt", "cannot be read as a checkpoint of torch"),
        ("text.safetensors", "cannot be read as safetensors"),
        ("empty", "has no pytorch_model.bin"),
        ("ours", "is a model that this package exported"),
        ("emty", "did you mean empty?"),
    ):
        assert said in tool("from-reference", "--checkpoint", tmp_path / name, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_fourier": 3}, "noise_fourier is 3 in this model, but the reference networks only have 0"),
        ({"rope_base": 500.0}, "rope_base is 500.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"sampler": "coupled"}, "sampler is 'coupled'"),
    ],
)
def test_models_that_the_reference_cannot_build(
    tool: Callable[..., str], tmp_path: Path, changes: dict, said: str
) -> None:
    model = plain_network(tiny(**changes))
    save_folder(model, model.config, tmp_path / "model")
    assert said in tool("to-reference", "--model", tmp_path / "model", "--out", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_an_order_of_the_vocabulary_and_other_files(tool: Callable[..., str], tmp_path: Path) -> None:
    model = plain_network(tiny())
    save_folder(model, model.config, tmp_path / "model")
    assert "rename it" in tool("to-reference", "--model", tmp_path / "model", "--out", tmp_path / "back.ckpt")
    assert "is not an exported model" in tool("to-reference", "--model", tmp_path, "--out", tmp_path / "b.pt")
    model.config.vocabulary_order = "frequency"
    ordered = ImdmForMaskedLM(model.config)
    save_folder(ordered, model.config, tmp_path / "ordered")
    assert "vocabulary_order is 'frequency'" in tool(
        "to-reference", "--model", tmp_path / "ordered", "--out", tmp_path / "b.pt"
    )


def test_a_conversion_that_computes_something_else_fails(
    tool: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(module_state(reference()), tmp_path / "a.pt")
    monkeypatch.setattr(self_check, "largest_error", lambda *_: 0.3)
    said = tool("from-reference", "--checkpoint", tmp_path / "a.pt", "--out", tmp_path / "out")
    assert "its logits differ from the source's by 3.0e-01 of the largest, more than 1e-04" in said
    assert load_folder(tmp_path / "out").config.hidden_size == 32


def test_the_command_line() -> None:
    assert convert_cli.MAX_SHARD_SIZE == shard_files.MAX_SHARD_SIZE
    for words, said in (
        ([], "COMMAND"),
        (["from-reference"], "--checkpoint"),
        (["push", "--model", "m"], "--repo"),
    ):
        with pytest.raises(UserError, match=said):
            parse_convert_arguments(words)
