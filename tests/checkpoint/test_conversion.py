"""Reference checkpoints become exported models that compute the same, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from imdm_scale.checkpoint.from_reference import Choices, from_reference
from imdm_scale.checkpoint.reference_dit import DitShape, ReferenceDit
from imdm_scale.checkpoint.self_check import largest_error
from imdm_scale.checkpoint.write_reference import to_reference
from imdm_scale.hf.export import load_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.checkpoint.references import SIZES, VARIANTS, averages, lightning, module_state, reference
from tests.checkpoint.test_reference_dit import ORACLE


def convert(checkpoint: Path, out: Path, **choices: Any) -> tuple[ImdmForMaskedLM, str]:
    """The converted model, and what was printed."""
    lines: list[str] = []
    from_reference(checkpoint, out, Choices(**choices), lines.append)
    return load_folder(out), "\n".join(lines)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        return (
            x.dtype == y.dtype
            and x.shape == y.shape
            and bytes(x.view(torch.uint8).numpy()) == bytes(y.view(torch.uint8).numpy())
        )

    return a.keys() == b.keys() and all(equal(a[name].contiguous(), b[name].contiguous()) for name in a)


def test_mdlms_network_gives_its_recorded_logits(tmp_path: Path) -> None:
    oracle = torch.load(ORACLE, weights_only=True)
    tensors = {f"backbone.{name}": tensor for name, tensor in oracle["state_dict"].items()}
    torch.save(tensors, tmp_path / "mdlm.pt")
    model, said = convert(tmp_path / "mdlm.pt", tmp_path / "out", length=32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(oracle["indices"]).logits, oracle["output_sigma0"], rtol=0, atol=1e-5
        )
    assert (
        "MDLM, 2 layers of width 64, 4 heads, 97 ids" in said and "checked: logits differ by at most" in said
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_computes_the_same_and_comes_back(tmp_path: Path, variant: str, suffix: str) -> None:
    network = reference(**VARIANTS[variant])
    tensors = module_state(network)
    if suffix == ".safetensors":
        save_file(tensors, tmp_path / "given.safetensors")
    else:
        torch.save(tensors, tmp_path / "given.pt")
    softcap = VARIANTS[variant].get("softcap")
    model, _ = convert(tmp_path / f"given{suffix}", tmp_path / "out", softcap=softcap, length=24)
    assert largest_error(model, network) < 1e-5
    assert model.config.attention_softcap == (softcap or 0.0) and model.config.length == 24

    to_reference(tmp_path / "out", tmp_path / f"back{suffix}", True, lambda _: None)
    again, _ = convert(tmp_path / f"back{suffix}", tmp_path / "again", softcap=softcap, length=24)
    assert same_bits(model.state_dict(), again.state_dict())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1] and configs[0] == configs[1]


@pytest.mark.parametrize("variant", ["mdlm", "imdm_all", "masks"])
def test_bfloat16_comes_back_bit_for_bit(tmp_path: Path, variant: str) -> None:
    torch.save(module_state(reference(**VARIANTS[variant])), tmp_path / "given.pt")
    softcap = VARIANTS[variant].get("softcap")
    model, said = convert(tmp_path / "given.pt", tmp_path / "out", softcap=softcap, dtype="bf16")
    assert "as bfloat16" in said and "allowed 5e-02" in said
    with torch.no_grad():  # a sign that a sum with zero would lose
        model.final_norm.bias[0] = -0.0
        model.save_pretrained(tmp_path / "out")
    for suffix in (".pt", ".safetensors"):
        to_reference(tmp_path / "out", tmp_path / f"back{suffix}", True, lambda _: None)
        again, said = convert(tmp_path / f"back{suffix}", tmp_path / f"again{suffix}", softcap=softcap)
        assert "as bfloat16" in said
        assert same_bits(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_networks_load_it_strictly(tmp_path: Path, variant: str) -> None:
    network = reference(**VARIANTS[variant])
    torch.save(module_state(network), tmp_path / "given.pt")
    softcap = VARIANTS[variant].get("softcap")
    model, _ = convert(tmp_path / "given.pt", tmp_path / "out", softcap=softcap)
    lines: list[str] = []
    to_reference(tmp_path / "out", tmp_path / "sub" / "back.pth", False, lines.append)
    tensors = torch.load(tmp_path / "sub" / "back.pth", weights_only=True)
    theirs = ReferenceDit(DitShape(**{**SIZES, **VARIANTS[variant], "cond_size": 128}))
    assert [name.removeprefix("backbone.") for name in tensors] == list(theirs.state_dict())
    theirs.load_state_dict({name.removeprefix("backbone."): t for name, t in tensors.items()}, strict=True)
    assert largest_error(model, theirs.eval()) < 1e-5
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["back.pth"]
    assert len(lines) == 1 and "model.hidden_size=32" in lines[0]
    assert ("model.softcap=" in lines[0]) == (softcap is not None)


def test_a_bare_backbone_needs_no_prefix(tmp_path: Path) -> None:
    network = reference()
    bare = {name: tensor for name, tensor in network.state_dict().items() if "inv_freq" not in name}
    torch.save(bare, tmp_path / "dit.bin")
    model, said = convert(tmp_path / "dit.bin", tmp_path / "out", num_heads=4)
    assert largest_error(model, network) < 1e-5
    assert "mask token 30, the last id" in said and "no soft cap" in said and "time conditioning off" in said


CONFIG = {
    "time_conditioning": False,
    "parameterization": "subs",
    "model": {"length": 20, "n_heads": 4, "softcap": 2.0},
    "algo": {"noise_type": "randn", "noise_scale": 0.5},
}


def test_lightning_checkpoints_tell_their_settings(tmp_path: Path) -> None:
    network = reference(noise_dim=6, softcap=2.0)
    extra = {"gen_ppl_metric.total": torch.ones(1), "gen_ppl_metric.count": torch.ones(1)}
    state = {"state_dict": module_state(network) | extra}
    model, said = convert(lightning(tmp_path / "a.ckpt", network, CONFIG, **state), tmp_path / "out")
    config = model.config
    assert (config.length, config.attention_softcap, config.noise_kind, config.noise_scale) == (
        20,
        2.0,
        "normal",
        0.5,
    )
    assert largest_error(model, network) < 1e-5
    assert "its averaged weights are not used; --ema takes them" in said
    assert "not used: 2 tensors of gen_ppl_metric, epoch" in said and "optimizer_states" in said
    assert "does not tell: mask token" in said and said.count("does not tell") == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| updates | 1000 |" in card and "| source | a.ckpt |" in card and "| weights | as trained |" in card
    )


def test_interpolations_tell_nothing(tmp_path: Path) -> None:
    config = {
        "model": {"length": "${data.length}", "n_heads": "${x}"},
        "time_conditioning": "${algo.time_conditioning}",
    }
    _, said = convert(lightning(tmp_path / "a.ckpt", reference(), config), tmp_path / "out")
    assert "does not tell: length 1024 (--length)" in said and "does not tell: time conditioning off" in said


@pytest.mark.parametrize("variant", VARIANTS)
def test_averaged_weights_are_matched_by_their_order(tmp_path: Path, variant: str) -> None:
    network = reference(**VARIANTS[variant])
    config = {"model": {"softcap": VARIANTS[variant].get("softcap", -1.0)}}
    model, said = convert(lightning(tmp_path / "a.ckpt", network, config), tmp_path / "out", averaged=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, average in zip(trained, averages(network), strict=True):
            parameter.copy_(average)
    assert largest_error(model, network) < 1e-5
    assert "--ema takes them" not in said
    assert "| weights | moving averages |" in (tmp_path / "out" / "README.md").read_text()


def test_averages_may_cover_the_noise_schedule_and_a_frozen_table(tmp_path: Path) -> None:
    network = reference(num_masks=1)
    ema = {"shadow_params": [*(2 * p.detach() for p in network.parameters()), torch.ones(2)]}
    state = module_state(network) | {"noise.sigmas": torch.ones(2)}
    file = lightning(tmp_path / "a.ckpt", network, ema=ema, state_dict=state)
    model, said = convert(file, tmp_path / "out", averaged=True)
    assert torch.equal(model.head.bias, 2 * network.output_layer.linear.bias) and "1 tensors of noise" in said


@pytest.mark.parametrize("kind", ["single", "sharded", "bin", "sharded bin"])
def test_folders_of_the_hub(tmp_path: Path, kind: str) -> None:
    network = reference()
    folder = tmp_path / "mdlm-owt"
    folder.mkdir()
    config = {"model_type": "mdlm", "model_length": 40, "n_heads": 4, "time_conditioning": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = module_state(network)
    stem, suffix, save = ("model", "safetensors", save_file)
    if "bin" in kind:
        stem, suffix, save = ("pytorch_model", "bin", torch.save)
    names = list(tensors)
    parts = [names[::2], names[1::2]] if "sharded" in kind else [names]
    files = (
        [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
        if "sharded" in kind
        else [f"{stem}.{suffix}"]
    )
    for file, part in zip(files, parts, strict=True):
        save({name: tensors[name] for name in part}, folder / file)
    if "sharded" in kind:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model, said = convert(folder, tmp_path / "out")
    assert largest_error(model, network) < 1e-5
    assert model.config.length == 40 and said.count("does not tell") == 1


def test_the_result_may_be_dealt_to_several_files(tmp_path: Path) -> None:
    torch.save(module_state(reference()), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "one")
    convert(tmp_path / "a.pt", tmp_path / "out", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    merged = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert same_bits(merged, load_file(tmp_path / "one" / "model.safetensors"))
