"""Training from prepared data: a mixture of a web server's and a folder's, stopped, and gone on with from there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from imdm_scale.data.manifest import FILE_NAME, Manifest
from imdm_scale.data.order import ShuffleOrder
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.tokenizer import load_tokenizer
from tests.data_pipeline.failing_server import FailingServer
from tests.end_to_end.test_train import SMALL, ZERO3, typed


def prepared(folder: Path, words: str) -> Path:
    """Some hundred blocks of 64 tokens in shards of 16."""
    text = folder / f"{words.split()[0]}.txt"
    text.write_text(
        "\n\n".join(f"{words}, said chapter {number}, and so it was." * 9 for number in range(300))
    )
    options = PrepareOptions(length=64, shard_bytes=128 + 16 * 64 * 2, shuffle_window=2)
    prepare(SourceSpec(str(text)), load_tokenizer(None), options, folder / words.split()[0])
    return folder / words.split()[0]


def run(run_dir: Path, cache: Path, url: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return typed(
        "tools/train.py",
        "--ds_config",
        ZERO3,
        f"run_dir={run_dir}",
        *SMALL,
        f"data.path=[{url},{folder}]",
        "data.weights=[3,1]",
        f"data.cache_dir={cache}",
        "data.cache_gib=0.001",
        *words,
        processes=2,
    )


@pytest.mark.parametrize("workers", [1])
def test_a_run_and_its_continuation(tmp_path: Path, workers: int) -> None:
    far, near = prepared(tmp_path, "far away"), prepared(tmp_path, "near by")
    cache = tmp_path / "cache"
    with FailingServer(far) as server:
        server.failures["train/00003.npy"] = ["error", "corrupt"]
        done = run(tmp_path / "first", cache, server.url, near, f"data.workers={workers}")
        assert done.returncode == 0, done.stdout + done.stderr
        shards = {path: count for path, count in server.requests.items() if path.startswith("train/")}
        # Two processes a rank, two ranks: each shard came once, the failing one three times.
        assert shards.pop("train/00003.npy") == 3 and set(shards.values()) == {1}
        assert "75.0% http" in done.stdout
        updates = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()]
        assert [update["replaced_samples"] for update in updates] == [0] * 4
        checkpoint = tmp_path / "first/checkpoints/step-00000003"
        assert json.loads((checkpoint / "data.json").read_text())["samples"] == 24

        words = [f"data.continue_from={checkpoint}", "evaluate.at_end=false", "train.max_steps=2"]
        done = run(tmp_path / "second", cache, server.url, near, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "from sample 24 on" in " ".join(done.stdout.split())
        assert json.loads((tmp_path / "second/student/data.json").read_text())["samples"] == 24 + 16

        done = run(tmp_path / "third", cache, server.url, near, words[0], "seed=2")
        assert done.returncode != 0 and "in the order of seed 1, but seed is 2" in done.stderr


def test_a_missing_shard_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "near by")
    shards = Manifest.from_json((folder / FILE_NAME).read_text(), "").splits["train"].shards
    first = ShuffleOrder([shard.num_blocks for shard in shards], window=2, seed=1).windows(0)[0].shards[0]
    (folder / shards[first].file).unlink()
    words = ["--ds_config", ZERO3, *SMALL, f"data.path={folder}"]
    done = typed("tools/train.py", *words, f"run_dir={tmp_path / 'stopped'}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and f"{shards[first].file} is missing" in done.stderr
    done = typed("tools/train.py", *words, f"run_dir={tmp_path / 'skipped'}", "data.on_damage=skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SKIPPED DATA" in done.stderr
    last = json.loads((tmp_path / "skipped/metrics.jsonl").read_text().splitlines()[-1])
    assert last["replaced_samples"] > 0
