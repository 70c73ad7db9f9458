"""From a checkpoint of any layout to an exported model and back, bit for bit; what people are told of checkpoints."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from imdm_scale.checkpoint.split import write_split
from imdm_scale.checkpoint.stored_model import locate_model, open_model
from imdm_scale.checkpoint.verify import name_of
from imdm_scale.config.model_folder import CHECKPOINTS
from imdm_scale.data.tokenizer import load_tokenizer
from imdm_scale.errors import UserError
from imdm_scale.hf.export import config_from_architecture
from tests.tiny import plain_network, tiny, weights_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = load_tokenizer(None)
ARCHITECTURE = tiny(vocab_size=TOKENIZER.vocab_size, mask_token_id=TOKENIZER.mask_id, num_layers=4)
WEIGHTS = weights_of(plain_network(ARCHITECTURE))
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def convert(*words: object) -> tuple[int, str]:
    """Exit code and output of tools/convert.py."""
    done = subprocess.run(
        [sys.executable, "tools/convert.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def number(kind: str, name: str) -> Tensor:
    """The averages are the network's weights; the others differ."""
    return WEIGHTS[name] * (1 + 0.25 * (KINDS[::-1].index(kind)))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of TP2 x PP2, and one of TP4 of the same numbers."""
    place = tmp_path_factory.mktemp("run")
    words = place / "words"
    words.mkdir()
    TOKENIZER.save(words)
    config = config_from_architecture(
        ARCHITECTURE, tokenizer_fingerprint=TOKENIZER.fingerprint, bos_token_id=TOKENIZER.bos_id
    )
    for step, tp, pp in ((5, 4, 1), (10, 2, 2)):
        folder = place / CHECKPOINTS / name_of(step)
        files = sorted(words.iterdir())
        write_split(folder, config, number, tp=tp, pp=pp, kinds=KINDS, tokenizer_files=files)
    return place


def test_to_hf_and_from_hf(run_dir: Path, tmp_path: Path) -> None:
    code, said = convert("to-hf", "--checkpoint", run_dir, "--out", tmp_path / "hf")
    assert code == 0 and "step-00000010, moving averages" in said and "bit for bit" in said
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)

    older = run_dir / CHECKPOINTS / name_of(5)
    code, _ = convert("to-hf", "--checkpoint", older, "--out", tmp_path / "tp4", "--no-check")
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.model"):
        assert (tmp_path / "tp4" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()

    code, said = convert(
        "from-hf", "--model", tmp_path / "hf", "--out", tmp_path / "cut", "--tp", 2, "--pp", 4
    )
    assert code == 0 and "8 files of weights" in said and "bit for bit" in said
    code, said = convert("to-hf", "--checkpoint", tmp_path / "cut", "--out", tmp_path / "again")
    assert code == 0, said
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_bfloat16_and_several_files_come_back(run_dir: Path, tmp_path: Path) -> None:
    words = ("--raw", "--dtype", "bf16", "--max-shard-size", "100KB")
    code, said = convert("to-hf", "--checkpoint", run_dir, "--out", tmp_path / "hf", *words)
    assert code == 0 and "as trained" in said and "bfloat16" in said
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    expected = {name: number("master", name).bfloat16() for name in WEIGHTS}
    code, said = convert(
        "from-hf", "--model", tmp_path / "hf", "--out", tmp_path / "cut", "--tp", 4, "--pp", 1
    )
    assert code == 0, said
    for model in (open_model(tmp_path / "hf"), open_model(tmp_path / "cut")):
        assert all(torch.equal(model.tensor(name).bfloat16(), expected[name]) for name in expected)
    code, said = convert(
        "to-hf", "--checkpoint", tmp_path / "cut", "--out", tmp_path / "b", "--dtype", "bf16"
    )
    assert code == 0, said
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_export_works_without_the_package(run_dir: Path, tmp_path: Path) -> None:
    """In a Python in which neither DeepSpeed, nor Megatron-core, nor this package can be imported."""
    convert("to-hf", "--checkpoint", run_dir, "--out", tmp_path / "hf", "--no-check")
    program = f"""
import sys
for name in ("deepspeed", "megatron", "megatron.core", "imdm_scale"):
    sys.modules[name] = None
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "hf")!r}, trust_remote_code=True)
ids = model.generate_text(num_samples=2, num_steps=2, seed=0)
print(tuple(ids.shape), len(tokenizer), tokenizer.decode(ids[0]) != "")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"(2, {ARCHITECTURE.length})") and done.stdout.strip().endswith("True")


def test_inspect_verify_and_diff(run_dir: Path, tmp_path: Path) -> None:
    code, said = convert("inspect", run_dir)
    assert code == 0
    assert "tp 2 x pp 2" in said and "tp 4 x pp 1" in said and "master, exp_avg, exp_avg_sq, ema" in said
    code, said = convert("verify", run_dir)
    assert code == 0 and said.count("whole, ") == 2

    first, second = (run_dir / CHECKPOINTS / name_of(step) for step in (5, 10))
    code, said = convert("diff", first, second)
    assert code == 1 and "layout.tp: 4 | 2" in said and "tensors differ" not in said
    assert convert("diff", first, first) == (0, "")

    copy = shutil.copytree(run_dir, tmp_path / "run")
    shard = copy / CHECKPOINTS / name_of(10) / "student-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, said = convert("verify", copy)
    assert code == 2 and f"{shard.name} has been changed" in said and "error: damaged: step-00000010" in said
    code, said = convert("diff", copy / CHECKPOINTS / name_of(10), second)
    assert code == 1 and "1 of" in said and "tensors differ" in said
    code, said = convert("to-hf", "--checkpoint", copy, "--out", tmp_path / "hf", "--no-check")
    assert code == 0 and "passed over" in said and "step-00000005, moving averages" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("to-hf", "--checkpoint", "nowhere", "--out", "x"), "nowhere holds no checkpoint"),
        (("to-hf", "--checkpoint", "x", "--out", "y", "--ema", "--raw"), "not allowed with"),
        (
            ("from-hf", "--model", "no/where", "--out", "x", "--tp", "1", "--pp", "1"),
            "the Hugging Face hub does not",
        ),
        (("from-hf", "--model", "docs/none", "--out", "x", "--tp", "1", "--pp", "1"), "which does not exist"),
        (
            ("from-hf", "--model", "docs", "--out", "x", "--tp", "1", "--pp", "1"),
            "no config.json and no checkpoint",
        ),
        (("inspect", "docs"), "docs holds no checkpoint"),
        (("verify", "docs"), "docs holds no checkpoint"),
        (("diff", "docs", "docs"), "manifest.json cannot be read"),
    ],
)
def test_mistakes_get_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    code, said = convert(*words)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and sentence in errors[0], said


def test_networks_that_differ_are_not_compared(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    network = plain_network(tiny())
    write_split(other, network.config, lambda kind, name: weights_of(network)[name], tp=1, pp=1)
    code, said = convert("diff", run_dir / CHECKPOINTS / name_of(5), other)
    assert code == 2 and "architecture.num_layers: 4 | 2" in said and "different networks" in said


def test_where_a_model_may_be(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = run_dir / CHECKPOINTS / name_of(10)
    assert locate_model(str(run_dir), "teacher.path") == newest
    assert locate_model(str(newest), "teacher.path") == newest
    assert torch.equal(open_model(newest).tensor("head.bias"), WEIGHTS["head.bias"]), "the averages"
    assert torch.equal(open_model(newest, "master").tensor("head.bias"), number("master", "head.bias"))
    with pytest.raises(UserError, match="holds no median weights"):
        open_model(newest, "median")

    convert("to-hf", "--checkpoint", run_dir, "--out", tmp_path / "run" / "student", "--no-check")
    exported = tmp_path / "run" / "student"
    assert locate_model(str(tmp_path / "run"), "teacher.path") == exported
    assert locate_model(str(exported), "teacher.path") == exported
    assert open_model(exported).sha256() != open_model(newest).sha256()

    import imdm_scale.checkpoint.stored_model as stored_model

    monkeypatch.setattr(stored_model, "download", lambda name, setting, patterns: Path("cache") / name)
    assert locate_model("owner/model", "teacher.path") == Path("cache/owner/model")


def test_another_kind_of_model_is_told_how_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mdlm"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="from-reference"):
        open_model(tmp_path)


def test_the_readers_need_no_megatron() -> None:
    """Conversion is for machines without it: no module that it uses imports Megatron-core or DeepSpeed."""
    assert importlib.util.find_spec("megatron") is not None
    program = (
        "import sys\n"
        "from imdm_scale.checkpoint import from_hf, inspection, llada_conversion, to_hf, write_reference\n"
        "print([name for name in ('megatron', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
