"""Weights are written tensor by tensor, into one file or several, as transformers and safetensors read them."""

from __future__ import annotations

import hashlib
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig

from imdm_scale.config.model_folder import missing_files
from imdm_scale.errors import UserError
from imdm_scale.evaluate.exported import describe
from imdm_scale.hf.export import export_source, load_folder, save_folder, weight_shapes
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from imdm_scale.hf.safetensors_writer import SafetensorsWriter, TensorEntry
from imdm_scale.hf.shard_files import parse_size, plan_shards
from imdm_scale.hf.weight_files import open_weights
from tests.hf.test_hf_export import assert_same_model, contents

TENSORS = {
    "a": torch.arange(5),
    "b": torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 4).bfloat16(),
    "scalar": torch.tensor(2.5).bfloat16(),
    "flags": torch.tensor([True, False]),
}


def entries_of(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_the_safetensors_library_reads_what_the_writer_writes(tmp_path):
    path = tmp_path / "w.safetensors"
    with SafetensorsWriter(path, entries_of(TENSORS)) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    content = path.read_bytes()
    assert writer.num_bytes == len(content) and writer.sha256 == hashlib.sha256(content).hexdigest()
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_converted_and_may_be_laid_out_in_any_way(tmp_path):
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with SafetensorsWriter(tmp_path / "w", [TensorEntry("m", torch.bfloat16, (3, 5))]) as writer:
        writer.write("m", matrix.T)
    assert torch.equal(load_file(tmp_path / "w")["m"], matrix.T.bfloat16())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("b", TENSORS["b"])], "b .* comes where a "),
        ([("a", torch.arange(4))], r"a \(4,\) comes where a \(5,\)"),
        ([], "2 tensors are missing, the first is a"),
        ([("a", TENSORS["a"]), ("b", TENSORS["b"]), ("c", TENSORS["a"])], "the end of the file"),
    ],
)
def test_other_tensors_than_announced_are_refused(tmp_path, given, said):
    entries = entries_of({name: TENSORS[name] for name in ("a", "b")})
    with pytest.raises(ValueError, match=said), SafetensorsWriter(tmp_path / "w", entries) as writer:
        for name, tensor in given:
            writer.write(name, tensor)


def test_entries_that_cannot_be_laid_out_are_refused(tmp_path):
    flags = TensorEntry("flags", torch.bool, (3,))
    for entries in ([flags, TensorEntry("a", torch.int64, (2,))], [flags, flags]):
        with pytest.raises(ValueError, match=r"would begin at byte 3|two tensors"):
            SafetensorsWriter(tmp_path / "w", entries)


def test_shards_keep_the_order_and_the_size():
    entries = [TensorEntry(str(i), torch.float32, (size,)) for i, size in enumerate((2, 1, 9, 1, 1))]
    plan = plan_shards(entries, 12)
    assert {file: [entry.name for entry in shard] for file, shard in plan.items()} == {
        "model-00001-of-00003.safetensors": ["0", "1"],
        "model-00002-of-00003.safetensors": ["2"],
        "model-00003-of-00003.safetensors": ["3", "4"],
    }
    assert list(plan_shards(entries, 56)) == ["model.safetensors"]
    assert [parse_size(size) for size in ("5GB", "1.5 kb", 7, "7")] == [5 * 10**9, 1500, 7, 7]
    for wrong in ("5 GiB", "", "-1", 0, "many"):
        with pytest.raises(UserError, match="no size of a file"):
            parse_size(wrong)


def test_a_folder_of_several_files_is_loaded_everywhere(network, tmp_path):
    model = network(vocabulary_order="projection")
    model.vocabulary_rank.copy_(torch.randperm(31, generator=torch.Generator().manual_seed(0)))
    folder = save_folder(model, model.config, tmp_path / "out", max_shard_size="20KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert missing_files(folder) == [] and missing_files(tmp_path) == ["config.json", "model.safetensors"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert_same_model(model, load_folder(folder))
    loaded, report = ImdmForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert_same_model(model, loaded)
    assert not any(report.values())
    files = open_weights(folder)
    assert torch.equal(files.tensor("head.bias"), model.head.bias) and files.shapes == weight_shapes(
        model.config
    )


def test_transformers_own_shards_are_loaded(network, tmp_path):
    model = network()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_model(model, load_folder(tmp_path))


def test_the_hash_of_a_model_is_over_all_its_files(network, tmp_path):
    config = network(bos_token_id=1, eos_token_id=2).config
    one, other = network(), network()
    with torch.no_grad():
        other.head.bias[-1] += 1  # in the last file
    folders = [
        save_folder(model, config, tmp_path / str(i), max_shard_size="20KB")
        for i, model in enumerate((one, one, other))
    ]
    hashes = [describe(folder).weights_sha256 for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]
    single = save_folder(one, config, tmp_path / "single")
    weights = (single / "model.safetensors").read_bytes()
    assert describe(single).weights_sha256 == hashlib.sha256(weights).hexdigest()


def test_damaged_sets_of_files_are_refused_by_name(network, tmp_path):
    model = network()
    folder = save_folder(model, model.config, tmp_path / "out", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    second = folder / listed["weight_map"]["head.bias"]
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} cannot be read as safetensors"):
        load_folder(folder)
    second.write_bytes(kept)
    outside = {**listed, "weight_map": {**listed["weight_map"], "head.bias": "../other.safetensors"}}
    swapped = {
        **listed,
        "weight_map": {**listed["weight_map"], "head.bias": listed["weight_map"]["blocks.0.norm1.weight"]},
    }
    for wrong, said in (
        (outside, "outside its folder"),
        (swapped, "head.bias"),
        ({}, "cannot be read as an index"),
        (
            {**listed, "weight_map": {k: v for k, v in listed["weight_map"].items() if k != "head.bias"}},
            "head.bias",
        ),
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=said):
            open_weights(folder)


def test_at_most_one_tensor_is_in_memory(network, tmp_path):
    model = network()
    weights = model.state_dict()
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def made(name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = weights[name].clone()
        alive.append(weakref.ref(tensor))
        return tensor

    folder = export_source(made, model.config, tmp_path / "out", max_shard_size="20KB")
    assert len(alive) == len(weights) and most == 0
    assert_same_model(model, load_folder(folder))


def test_pairs_must_come_in_file_order_and_be_all(network, tmp_path):
    model = network()
    pairs = list(model.state_dict().items())
    for wrong, said in (
        (pairs[::-1], "comes where token_embedding.weight"),
        (pairs[:-1], "1 tensors are missing, the first is head.bias"),
        ([*pairs, ("head.bias", model.head.bias)], "head.bias has no place"),
        ([], "no weights"),
    ):
        with pytest.raises(ValueError, match=said):
            save_folder(wrong, model.config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_weights_give_the_same_bytes(network, tmp_path):
    model = network(bos_token_id=1, eos_token_id=2)
    facts = {"method": "im_sdtt | four", "versions": {"torch": "2", "none": None}, "left out": None}
    folders = [
        save_folder(weights, model.config, tmp_path / name, facts=facts)
        for name, weights in (("a", model), ("b", iter(list(model.state_dict().items()))))
    ]
    assert contents(folders[0]) == contents(folders[1])
    card = (folders[0] / "README.md").read_text()
    assert (
        "| method | im_sdtt \\| four |" in card
        and "| versions | torch 2 |" in card
        and "left out" not in card
    )
    assert hashlib.sha256((folders[0] / "model.safetensors").read_bytes()).hexdigest() in card
    generation = GenerationConfig.from_pretrained(folders[0])
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, None)
    plain = save_folder(network(), network().config, tmp_path / "plain")
    assert not (plain / "generation_config.json").exists()
