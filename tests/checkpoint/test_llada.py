"""LLaDA's folders: import, export back, and the check of the one against the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from imdm_scale.checkpoint.llada import llada_names, read_llada, write_llada
from imdm_scale.checkpoint.llada_reference import check_llada, llada_logits
from imdm_scale.checkpoint.weights import folder_weights
from imdm_scale.config.architecture import Architecture
from imdm_scale.config.model_folder import INDEX_FILE as INDEX
from imdm_scale.config.model_folder import WEIGHTS_FILE as ONE_FILE
from imdm_scale.hf.export import config_from_architecture, save_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from imdm_scale.model.weights import canonical_shapes
from tests.checkpoint.llada_folder import CONFIG, random_tensors, refusal
from tools.convert import main as convert


def converted(folder: Path, vocab_size: int | None = None) -> ImdmForMaskedLM:
    architecture, source = read_llada(folder, vocab_size)
    model = ImdmForMaskedLM(config_from_architecture(architecture))
    model.load_state_dict({name: source(name).float() for name in canonical_shapes(architecture)})
    return model.eval()


def test_architecture(llada: Callable[..., Path]) -> None:
    architecture, source = read_llada(llada())
    assert architecture == Architecture(
        vocab_size=64,
        mask_token_id=50,
        length=24,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        noise_dim=0,
        rope_base=500000.0,
        norm="rmsnorm",
        mlp="swiglu",
        mlp_size=56,
        bias=False,
    )
    shapes = canonical_shapes(architecture)
    assert {name: tuple(source(name).shape) for name in shapes} == shapes
    names = [theirs for name in shapes for theirs in llada_names(name)]
    assert sorted(names) == sorted(random_tensors(torch.float32))


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"embedding_size": None, "vocab_size": 64}, "vocab_size", 64),
        ({"n_kv_heads": None}, "num_heads", 4),
        ({"n_kv_heads": "absent", "multi_query_attention": False}, "num_heads", 4),
        ({"rope_theta": "absent"}, "rope_base", 10000.0),
        ({"rms_norm_eps": 1e-6}, "layer_norm_eps", 1e-6),
        ({"max_sequence_length": "absent"}, "length", 1024),
    ],
)
def test_other_descriptions(
    llada: Callable[..., Path], changes: dict[str, Any], field: str, value: float
) -> None:
    assert getattr(read_llada(llada(**changes))[0], field) == value


@pytest.mark.parametrize(
    "changes", [{}, {"rope_theta": 100.0, "rms_norm_eps": 1e-2}, {"rope_theta": "absent"}]
)
def test_the_converted_network_is_llada(llada: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = llada(**changes)
    model = converted(folder)
    assert check_llada(folder, model) < 1e-5
    with torch.no_grad():
        model.blocks[1].mlp.dense_in.weight[:1] += 0.1
    assert check_llada(folder, model) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_heads": 8},
        {"rope_theta": 10000.0},
        {"rms_norm_eps": 1e-2},
    ],
)
def test_the_reference_depends_on_the_description(wrong: dict[str, Any]) -> None:
    tensors = random_tensors(torch.float32)
    ids_BL = torch.arange(24)[None]
    logits_BLV = llada_logits(CONFIG, tensors.__getitem__, ids_BL)
    assert (llada_logits({**CONFIG, **wrong}, tensors.__getitem__, ids_BL) - logits_BLV).abs().max() > 1e-3


def test_the_reference_is_transformers_llama_without_its_causal_mask() -> None:
    """LLaDA's authors changed Llama's attention mask and the names of its tensors."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            attn_implementation="eager",
        )
    )
    renamed = {
        "transformer.wte.": "embed_tokens.",
        "transformer.blocks.": "layers.",
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "model.transformer.ff_out": "lm_head",
        "transformer.ln_f": "norm",
        "ff_out": "mlp.down_proj",
    }
    tensors = random_tensors(torch.float32)
    its_tensors = {}
    for name, tensor in tensors.items():
        for theirs, its in renamed.items():
            name = name.replace(theirs, its)
        its_tensors[name] = tensor
    llama.load_state_dict(its_tensors)
    ids_BL = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BLV = llama.eval()(ids_BL, attention_mask=torch.zeros(3, 1, 24, 24), use_cache=False).logits
        causal_BLV = llama(ids_BL).logits
    assert (expected_BLV - causal_BLV).abs().max() > 0.1
    assert (llada_logits(CONFIG, tensors.__getitem__, ids_BL) - expected_BLV).abs().max() < 1e-5


@pytest.mark.parametrize("pair", [("q_proj", "k_proj"), ("k_proj", "v_proj"), ("ff_proj", "up_proj")])
def test_no_two_tensors_are_confused(llada: Callable[..., Path], pair: tuple[str, str]) -> None:
    """The check sees it when two of equal shape change places."""
    folder = llada()
    model = converted(folder)
    tensors = random_tensors(torch.float32)
    first, second = (f"model.transformer.blocks.1.{name}.weight" for name in pair)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    (folder / INDEX).unlink()
    save_file(tensors, folder / ONE_FILE)
    assert check_llada(folder, model) > 1e-2


def test_rows_beyond_the_tokenizers_ids_can_be_left_out(llada: Callable[..., Path], tmp_path: Path) -> None:
    folder = llada()
    model = converted(folder, 53)
    assert model.head.weight.shape == model.token_embedding.weight.shape == (53, 32)
    assert check_llada(folder, model) < 1e-5
    architecture, source = read_llada(folder, 53)
    write_llada(tmp_path / "back", architecture, source, like=folder)
    assert read_llada(tmp_path / "back")[0] == architecture
    for number in (50, 65):
        message = refusal(read_llada, folder, number)
        assert f"{number} token ids are to be kept" in message and "its mask's is 50" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 10_000])
def test_there_and_back_bit_for_bit(
    llada: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, max_shard_size: int
) -> None:
    folder, back = llada(dtype, vocab_size=64), tmp_path / "new" / "back"
    architecture, source = read_llada(folder)
    write_llada(back, architecture, source, like=folder, max_shard_size=max_shard_size)
    files = sorted(back.glob("*.safetensors"))
    assert (len(files) > 3) == (back / INDEX).is_file() == (max_shard_size == 10_000)
    assert len(files) > 3 or files == [back / ONE_FILE]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = random_tensors(dtype)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name]) for name in expected)
    fields = json.loads((back / "config.json").read_text())
    assert fields.pop("torch_dtype") == str(dtype).removeprefix("torch.")
    assert {name: fields[name] for name in CONFIG} == {**CONFIG, "vocab_size": 64}
    assert (back / "modeling_llada.py").read_text() == "# theirs\n" and (back / "tokenizer.json").is_file()
    assert read_llada(back)[0] == architecture
    assert check_llada(back, converted(folder)) < 1e-5


def test_export_in_another_type_and_without_a_model_to_follow(
    llada: Callable[..., Path], tmp_path: Path
) -> None:
    architecture, source = read_llada(llada())
    write_llada(tmp_path / "back", architecture, source, dtype=torch.bfloat16)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", ONE_FILE]
    again, stored = read_llada(tmp_path / "back")
    assert again == architecture
    for name in canonical_shapes(architecture):
        assert torch.equal(stored(name), source(name).bfloat16())


def test_a_llada_teacher_becomes_a_student(llada: Callable[..., Path], tmp_path: Path) -> None:
    """A student with mask noise, Fourier features included, starts as the LLaDA network whatever its noise is."""
    folder = llada()
    teacher = converted(folder)
    save_folder(teacher, teacher.config, tmp_path / "teacher")
    shape = read_llada(folder)[0]
    student = Architecture(**{**vars(shape), "noise_dim": 6, "noise_fourier": 2})
    weights = folder_weights(tmp_path / "teacher", student, seed=3)
    model = ImdmForMaskedLM(config_from_architecture(student))
    model.load_state_dict({name: weights(name) for name in canonical_shapes(student)})
    assert model.mask_embedding.dense_in.weight.abs().max() > 0
    assert check_llada(folder, model.eval()) < 1e-5
    ids_BL = torch.tensor([[50, 1, 50, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids_BL).logits, teacher(ids_BL).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tool_converts_there_and_back(
    llada: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llada(dtype)
    (folder / "tokenizer.json").unlink()  # an empty one, which is refused
    words = ("--max-shard-size", "20KB")
    assert convert(["from-llada", "--model", str(folder), "--out", str(tmp_path / "ours"), *words]) == 0
    assert (
        convert(["to-llada", "--model", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), *words]) == 0
    )
    assert capsys.readouterr().out.count("checked: logits differ by at most") == 2
    expected, found = read_llada(folder), read_llada(tmp_path / "back")
    assert expected[0] == found[0]
    for name in canonical_shapes(expected[0]):
        assert found[1](name).dtype == dtype and torch.equal(found[1](name), expected[1](name))
    assert (tmp_path / "ours" / INDEX).is_file() and (tmp_path / "back" / INDEX).is_file()
