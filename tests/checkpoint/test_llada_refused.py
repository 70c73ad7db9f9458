"""What is no LLaDA, or could not be one, is refused in one sentence, and nothing is left half done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from imdm_scale.checkpoint.llada import read_llada, write_llada
from imdm_scale.checkpoint.weights import Source
from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import INDEX_FILE as INDEX
from imdm_scale.config.model_folder import WEIGHTS_FILE as ONE_FILE
from tests.checkpoint.llada_folder import refusal
from tests.tiny import plain_network, tiny
from tools.convert import main as convert


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "its model_type is not 'llada'"),
        ({"n_kv_heads": 2}, "n_kv_heads is 2"),
        ({"n_kv_heads": None, "multi_query_attention": True}, "multi_query_attention is true"),
        ({"alibi": True}, "alibi is true"),
        ({"rope": False}, "rope is false"),
        ({"rope": "absent"}, "rope is false"),
        ({"weight_tying": True}, "weight_tying is true"),
        ({"weight_tying": "absent"}, "weight_tying is true"),
        ({"include_bias": True}, "include_bias is true"),
        ({"include_qkv_bias": True}, "include_qkv_bias is true"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm is true"),
        ({"layer_norm_type": "gemma_rms"}, 'layer_norm_type is "gemma_rms"'),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine is false"),
        ({"attention_layer_norm": True}, "attention_layer_norm is true"),
        ({"block_type": "sequential"}, 'block_type is "sequential"'),
        ({"block_group_size": 2}, "block_group_size is 2"),
        ({"activation_type": "gelu"}, 'activation_type is "gelu"'),
        ({"input_emb_norm": True}, "input_emb_norm is true"),
        ({"scale_logits": True}, "scale_logits is true"),
        ({"n_heads": 5, "n_kv_heads": 5}, "n_heads is 5"),
        ({"n_layers": "absent"}, "n_layers is null"),
        ({"d_model": "32"}, 'd_model is "32"'),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"mask_token_id": 64}, "mask_token_id is 64"),
        ({"mask_token_id": None}, "mask_token_id is null"),
        ({"n_layers": 4}, "no model.transformer.blocks.3.attn_norm.weight of shape (32,)"),
        ({"mlp_hidden_size": None}, "ff_proj.weight of shape (128, 32)"),
        ({"n_layers": 2}, "no place in LLaDA's network: model.transformer.blocks.2.attn_norm.weight"),
    ],
)
def test_what_cannot_be_imported(llada: Callable[..., Path], changes: dict[str, Any], words: str) -> None:
    folder = llada(**changes)
    message = refusal(read_llada, folder)
    assert words in message and str(folder) in message and "\n" not in message


def test_damaged_folders(llada: Callable[..., Path], tmp_path: Path) -> None:
    folder = llada()
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(whole[:1000])
    assert "b.safetensors cannot be read as safetensors" in refusal(read_llada, folder)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors cannot be read as safetensors" in refusal(read_llada, folder)
    save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
    assert f"{INDEX} and the files beside it disagree about" in refusal(read_llada, folder)
    (folder / INDEX).write_text("[]")
    assert f"{INDEX} cannot be read as an index" in refusal(read_llada, folder)
    (folder / INDEX).unlink()
    assert f"{ONE_FILE} cannot be read" in refusal(read_llada, folder)
    (folder / "config.json").write_text("{")
    assert "is not the configuration of a LLaDA model" in refusal(read_llada, folder)
    assert "is not the configuration of a LLaDA model" in refusal(read_llada, tmp_path / "nowhere")


LLAMA = tiny(norm="rmsnorm", mlp="swiglu", bias=False, noise_dim=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "layernorm"}, 'norm is "layernorm"'),
        ({"mlp": "gelu"}, 'mlp is "gelu"'),
        ({"bias": True}, "bias is true"),
        ({"qk_norm": True}, "qk_norm is true"),
        ({"attention_softcap": 5.0}, "attention_softcap is 5.0"),
        ({"noise_dim": 6}, "noise_dim is 6"),
        ({"noise_dim": 1, "num_masks": 5}, "noise_dim is 1"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    architecture = Architecture(**{**vars(LLAMA), **changes})
    message = refusal(write_llada, tmp_path / "back", architecture, weights(architecture))
    assert words in message and not (tmp_path / "back").exists()


def weights(architecture: Architecture) -> Source:
    return plain_network(architecture).state_dict().__getitem__


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path: Path) -> None:
    folder = tmp_path / "back"
    folder.mkdir()
    (folder / "mine").write_text("")
    assert "exists and is not empty" in refusal(write_llada, folder, LLAMA, weights(LLAMA))
    (folder / "mine").unlink()

    def failing(name: str) -> Tensor:
        if name == "head.weight":
            raise OSError(28, "No space left on device")
        return weights(LLAMA)(name)

    assert "No space left on device" in refusal(write_llada, folder, LLAMA, failing)
    assert list(tmp_path.rglob("*")) == [folder]
    write_llada(folder, LLAMA, weights(LLAMA))
    assert read_llada(folder)[0] == LLAMA


def test_the_tool_refuses_in_one_sentence(
    llada: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llada()
    assert convert(["from-llada", "--model", str(folder), "--out", str(tmp_path / "ours")]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert convert(["from-llada", "--model", str(tmp_path), "--out", str(tmp_path / "ours")]) == 2
    assert "is not the configuration of a LLaDA model" in capsys.readouterr().err
    assert convert(["to-llada", "--model", str(folder), "--out", str(tmp_path / "back")]) == 2
    assert "from-llada" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists() and not (tmp_path / "back").exists()
