"""Exported models with a tokenizer of any kind beside them, and with the mask in the middle of the vocabulary."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from imdm_scale.checkpoint.weights import folder_weights
from imdm_scale.config.architecture import Architecture
from imdm_scale.data.tokenizer import Tokenizer, load_tokenizer
from imdm_scale.diffusion.corruption import corrupt
from imdm_scale.diffusion.likelihood import nelbo_terms
from imdm_scale.diffusion.targets import two_substep_targets
from imdm_scale.distill.teacher_folder import check_teacher_folder
from imdm_scale.errors import UserError
from imdm_scale.hf.export import architecture_from_config, config_from_architecture, load_folder, save_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM
from tests.small_tokenizers import bert_folder, gpt2_folder

MIDDLE, LAST = 13, 30
"""A mask with ordinary ids on both sides, and the small network's own."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "packaged": load_tokenizer(None),
        "gpt2": load_tokenizer(gpt2_folder(root / "gpt2")),
        "bert": load_tokenizer(bert_folder(root / "bert")),
    }


@pytest.fixture
def export(network, tmp_path) -> Callable[[Tokenizer], Path]:
    """Writes an untrained network over a tokenizer's ids as a run does."""

    def write(tokenizer: Tokenizer) -> Path:
        model = network(
            vocab_size=tokenizer.vocab_size,
            mask_token_id=tokenizer.mask_id,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        tokenizer.save(tmp_path / "files")
        return save_folder(model, model.config, tmp_path / "student", (tmp_path / "files").iterdir())

    return write


@pytest.fixture
def sample_tool():
    path = Path(__file__).parents[2] / "tools" / "sample.py"
    spec = importlib.util.spec_from_file_location("sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["packaged", "gpt2", "bert"])
def test_transformers_loads_the_tokenizer_of_an_export(export, tokenizers, kind):
    folder = export(tokenizers[kind])
    theirs, config = AutoTokenizer.from_pretrained(folder), load_folder(folder).config
    text = "The sea was calm, and what of the night?"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizers[kind].encode(text)
    assert theirs.mask_token_id == config.mask_token_id
    assert (theirs.bos_token_id, theirs.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    assert load_tokenizer(folder).fingerprint == config.tokenizer_fingerprint


@pytest.mark.parametrize("kind", ["packaged", "gpt2", "bert"])
def test_the_sampler_writes_with_the_tokenizer_beside_the_model(
    export, tokenizers, sample_tool, capsys, kind
):
    tokenizer = tokenizers[kind]
    folder = export(tokenizer)
    arguments = ["--model", str(folder), "--num-samples", "1", "--prompt", "the sea"]
    assert sample_tool.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[1] the sea")
    prefix = [tokenizer.bos_id, *tokenizer.encode("the sea")]
    (ids,) = load_folder(folder).generate_text(1, 4, seed=0, prefix_ids=prefix).tolist()
    assert ids[: len(prefix)] == prefix and tokenizer.mask_id not in ids
    assert shown == f"[1] {tokenizer.decode(ids)}\n\n"


def test_the_sampler_refuses_another_tokenizer(export, tokenizers, sample_tool, tmp_path, capsys):
    folder = export(tokenizers["gpt2"])
    tokenizers["bert"].save(folder)
    assert sample_tool.main(["--model", str(folder)]) == 2
    assert "another tokenizer than the one beside it" in capsys.readouterr().err
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert sample_tool.main(["--model", str(folder)]) == 2
    assert "another tokenizer than the packaged one" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text("{")
    assert sample_tool.main(["--model", str(folder)]) == 2
    assert f"--model {folder} holds no tokenizer that can be read" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused_with_its_own(export, tokenizers):
    folder = export(tokenizers["gpt2"])
    architecture = architecture_from_config(load_folder(folder).config)
    check_teacher_folder(folder, architecture, tokenizers["gpt2"])
    with pytest.raises(UserError, match=rf"mean different words; set tokenizer\.path={folder},"):
        check_teacher_folder(folder, architecture, tokenizers["bert"])
    check_teacher_folder(folder, architecture, load_tokenizer(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"set tokenizer\.path to that model's,"):
        check_teacher_folder(folder, architecture, tokenizers["bert"])


def test_a_teacher_may_lack_fourier_features_but_not_have_others(export, tokenizers, tmp_path):
    folder = export(tokenizers["gpt2"])
    model = load_folder(folder)
    architecture = replace(architecture_from_config(model.config), noise_fourier=3)
    check_teacher_folder(folder, architecture, tokenizers["gpt2"])
    weights = folder_weights(folder, architecture, seed=0)
    assert torch.equal(weights("mask_embedding.dense_in.weight"), model.mask_embedding.dense_in.weight)
    features = weights("mask_embedding.dense_fourier.weight")
    assert features.shape == (4 * architecture.hidden_size, 12) and not features.any()

    fingerprint = tokenizers["gpt2"].fingerprint
    student = ImdmForMaskedLM(config_from_architecture(architecture, tokenizer_fingerprint=fingerprint))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(weights(name))
        student.mask_embedding.dense_fourier.weight.normal_(generator=torch.Generator().manual_seed(0))
    exported = save_folder(student, student.config, tmp_path / "student")
    assert architecture_from_config(load_folder(exported).config) == architecture
    check_teacher_folder(exported, architecture, tokenizers["gpt2"])
    again = folder_weights(exported, architecture, seed=0)("mask_embedding.dense_fourier.weight")
    assert torch.equal(again, student.mask_embedding.dense_fourier.weight)
    for other in (0, 4):
        with pytest.raises(UserError, match=rf"noise_fourier is 3 in .* but {other} in this run"):
            check_teacher_folder(exported, replace(architecture, noise_fourier=other), tokenizers["gpt2"])


def test_the_packaged_teacher_asks_for_the_packaged_tokenizer(tokenizers):
    from imdm_scale.assets import TEACHER
    from imdm_scale.hf.configuration_imdm import ImdmConfig

    architecture: Architecture = architecture_from_config(ImdmConfig.from_pretrained(TEACHER))
    with pytest.raises(UserError, match=r"leave tokenizer\.path null"):
        check_teacher_folder(TEACHER, architecture, tokenizers["bert"])
    check_teacher_folder(TEACHER, architecture, tokenizers["packaged"])


def exchanged(ids: Tensor) -> Tensor:
    """Token ids with the meanings of `MIDDLE` and `LAST` exchanged."""
    return torch.where(ids == LAST, MIDDLE, torch.where(ids == MIDDLE, LAST, ids))


@pytest.fixture
def same_network(network) -> tuple[ImdmForMaskedLM, ImdmForMaskedLM]:
    """One network over two orders of the vocabulary: the mask last, and in the middle."""
    last, middle = network(), network(mask_token_id=MIDDLE)
    order = exchanged(torch.arange(31))
    weights = last.state_dict()
    for name in ("token_embedding.weight", "head.weight", "head.bias"):
        weights[name] = weights[name][order]
    middle.load_state_dict(weights)
    return last, middle


def test_loss_and_targets_do_not_depend_on_where_the_mask_is(same_network):
    x_0_BL = torch.randint(0, LAST, (8, 12), generator=torch.Generator().manual_seed(0))
    t_B, sample_ids_B, found = torch.linspace(0.3, 1, 8).double(), torch.arange(8), []
    noise_BLD = torch.randn(8, 12, 6, generator=torch.Generator().manual_seed(1))
    for model, mask, labels_BL in zip(same_network, (LAST, MIDDLE), (x_0_BL, exchanged(x_0_BL)), strict=True):
        x_t_BL = corrupt(labels_BL, t_B, mask, 5, sample_ids_B, 0)
        masked_BL = x_t_BL == mask
        assert masked_BL.any() and not masked_BL.all()

        def logits(x_BL: Tensor, noise_BLD: Tensor, positions_N: Tensor, model=model) -> Tensor:
            return model(x_BL, mask_noise=noise_BLD).logits.flatten(0, 1)[positions_N]

        positions_N = masked_BL.flatten().nonzero()[:, 0]
        t_N = t_B.repeat_interleave(12)[positions_N]
        nelbo_N = nelbo_terms(logits(x_t_BL, noise_BLD, positions_N), labels_BL[masked_BL], t_N, mask)
        target_NV = two_substep_targets(
            logits, x_t_BL, noise_BLD, t_B, 1e-6, mask_id=mask, seed=5, sample_ids_B=sample_ids_B, step=0
        )
        assert (target_NV.softmax(-1)[:, mask] == 0).all()
        found.append((nelbo_N, target_NV if mask == LAST else target_NV[:, exchanged(torch.arange(31))]))
    for last, middle in zip(*found, strict=True):
        torch.testing.assert_close(last, middle, rtol=0, atol=2e-5)


def test_samples_do_not_depend_on_where_the_mask_is(same_network):
    template = torch.tensor([3, LAST, LAST, MIDDLE, LAST, 8, *[LAST] * 6])
    last, middle = (
        model.generate_text(20, num_steps=4, seed=3, prefix_ids=prefix, top_p=1e-9)  # the likeliest tokens
        for model, prefix in zip(same_network, (template, exchanged(template)), strict=True)
    )
    assert torch.equal(middle, exchanged(last))
    assert not (middle == MIDDLE).any() and (middle == LAST).any()
    free = same_network[1].generate_text(200, num_steps=4, seed=3)
    assert not (free == MIDDLE).any() and {12, 14, LAST} < set(free.flatten().tolist())
