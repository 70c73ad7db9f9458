"""Exported folders: whole or absent, bit-exact, and loadable without this package."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imdm_scale.checkpoint.weights import folder_weights
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.hf.export import load_folder, save_folder, travelling_code
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.tiny import tiny

ALONE = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("imdm_scale", "deepspeed", "megatron"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

folder = sys.argv[1]
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the sea", add_special_tokens=False).input_ids
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(given["ids"], mask_noise=given["noise"]).logits
text = model.generate_text(2, num_steps=3, seed=7, prefix_ids=[4, 5])
torch.save({"logits": logits, "text": text}, sys.argv[3])
print(json.dumps({
    "fingerprint": config.tokenizer_fingerprint,
    "ids": ids,
    "problems": sorted(name for names in report.values() for name in names),
    "modules": sorted(name for name in sys.modules if name.startswith("imdm_scale")),
}))
"""


def test_auto_classes_load_a_folder_where_the_package_is_not_installed(network, ids_BL, tmp_path):
    model = network(
        tokenizer_fingerprint="f00d",
        qk_norm=True,
        attention_softcap=5.0,
        noise_fourier=3,
        sampler="coupled",
        vocabulary_order="frequency",
    )
    model.vocabulary_rank.copy_(torch.randperm(31, generator=torch.Generator().manual_seed(0)))
    tokenizer = load_tokenizer(None)
    tokenizer.save(tmp_path / "tokenizer")
    folder = save_folder(
        model,
        model.config,
        tmp_path / "runs" / "a.model",
        (tmp_path / "tokenizer").iterdir(),
        max_shard_size=20_000,
    )
    assert (folder / "model.safetensors.index.json").exists()
    noise = torch.randn(3, 12, 6)
    torch.save({"ids": ids_BL, "noise": noise}, tmp_path / "given.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "given.pt"), str(tmp_path / "out.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "fingerprint": "f00d",
        "ids": tokenizer.encode("the sea"),
        "problems": [],
        "modules": [],
    }
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(out["logits"], model(ids_BL, mask_noise=noise).logits, rtol=0, atol=1e-6)
    assert torch.equal(out["text"], model.generate_text(2, num_steps=3, seed=7, prefix_ids=[4, 5]))


def assert_same_model(a: ImdmForMaskedLM, b: ImdmForMaskedLM) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_round_trip_is_bit_exact(network, tmp_path):
    model = network(bos_token_id=2)
    (tmp_path / "words.model").write_bytes(b"pieces")
    folder = save_folder(model, model.config, tmp_path / "out", [tmp_path / "words.model"])
    loaded = load_folder(folder)
    assert_same_model(model, loaded)
    assert_same_model(model, ImdmForMaskedLM.from_pretrained(folder))
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.bos_token_id == 2
    assert (folder / "words.model").read_bytes() == b"pieces"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words.model"]
    assert model.config.to_dict() == network(bos_token_id=2).config.to_dict()


def test_weights_may_be_stored_in_another_type(network, tmp_path):
    model = network()
    folder = save_folder(model.state_dict(), model.config, tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_folder(folder)
    assert_same_model(model.bfloat16(), loaded)
    assert loaded.dtype == ImdmForMaskedLM.from_pretrained(folder).dtype == torch.bfloat16
    assert loaded(torch.full((1, 4), 30)).logits.dtype == torch.bfloat16


def test_the_order_of_the_vocabulary_travels_with_the_weights(network, tmp_path):
    rank_V = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    model = network(vocabulary_order="projection")
    assert model.vocabulary_rank.tolist() == list(range(31))
    model.vocabulary_rank.copy_(rank_V)
    folder = save_folder(model, model.config, tmp_path / "out", dtype=torch.bfloat16)
    for loaded in (load_folder(folder), ImdmForMaskedLM.from_pretrained(folder)):
        assert loaded.config.vocabulary_order == "projection"
        assert loaded.vocabulary_rank.dtype == torch.int64 and torch.equal(loaded.vocabulary_rank, rank_V)
        assert loaded.dtype == torch.bfloat16
    assert torch.equal(load_file(folder / "model.safetensors")["vocabulary_rank"], rank_V)
    plain = save_folder(network(), network().config, tmp_path / "plain")
    assert "vocabulary_rank" not in load_file(plain / "model.safetensors")
    assert load_folder(plain).vocabulary_rank is None
    with pytest.raises(ValueError, match="vocabulary_rank"):
        save_folder(network(), model.config, tmp_path / "without")
    (plain / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        folder_weights(plain, tiny(), seed=0)


def test_travelling_code_is_flat_and_closed():
    code = travelling_code()
    assert {"modeling_imdm.py", "configuration_imdm.py", "layers_imdm.py", "sampler.py", "noise.py"} <= set(
        code
    )
    assert "export.py" not in code
    for name, source in code.items():
        assert "diffusion." not in source.replace("imdm_scale.diffusion", ""), name
        compile(source, name, "exec")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_earlier_export_and_nothing_else(network, tmp_path):
    model = network()
    folder = save_folder(model, model.config, tmp_path / "out")
    before = contents(folder)
    assert len(before["model.safetensors"]) > 40_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, hard)
    )  # larger files cannot be written, as on a full disk
    try:
        for place in (folder, tmp_path / "new"):
            with pytest.raises(UserError, match="could not be written"):
                save_folder(network(dropout=0.1), model.config, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("interruption", [OSError("no"), KeyboardInterrupt()])
def test_an_export_that_cannot_take_its_place_gives_it_back(network, tmp_path, monkeypatch, interruption):
    model = network()
    folder = save_folder(model, model.config, tmp_path / "out")
    before = contents(folder)
    rename = Path.rename

    def rename_all_but_the_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise interruption
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_all_but_the_new)
    with pytest.raises((UserError, KeyboardInterrupt)):
        save_folder(model, model.config, folder, dtype=torch.bfloat16)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_and_another_folder_is_not(network, tmp_path):
    model = network()
    save_folder(model, model.config, tmp_path / "out")
    save_folder(model, model.config, tmp_path / "out", dtype=torch.bfloat16)
    assert load_folder(tmp_path / "out").dtype == torch.bfloat16
    (tmp_path / "empty").mkdir()
    assert_same_model(load_folder(save_folder(model, model.config, tmp_path / "empty")), model)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("not a folder")
    for place in ("thesis", "file"):
        with pytest.raises(UserError, match="is not an exported model"):
            save_folder(model, model.config, tmp_path / place)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_tensors_that_do_not_fit_the_configuration_are_refused(network, tmp_path):
    model = network()
    tensors = model.state_dict()
    del tensors["head.bias"]
    with pytest.raises(ValueError, match=r"head\.bias"):
        save_folder(tensors, model.config, tmp_path / "out")
    with pytest.raises(ValueError, match="mask_embedding"):
        save_folder(model, network(noise_dim=5).config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_loaded_are_refused_by_name(network, tmp_path):
    model = network()
    folder = save_folder(model, model.config, tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere is not an exported model: it has no config\.json"):
        load_folder(tmp_path / "nowhere")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_folder(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    for wrong, match in (({"num_layers": 3}, r"blocks\.2"), ({"model_type": "bert"}, "model_type is 'bert'")):
        (folder / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(UserError, match=match):
            load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_folder(folder)
