"""A run's checkpoint, written under any layout, as an exported model: one process, no GPU, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from imdm_scale.checkpoint.description import read_description
from imdm_scale.checkpoint.facts import run_facts
from imdm_scale.checkpoint.manifest import AVERAGE, MASTER, Manifest
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.self_check import same_logits
from imdm_scale.checkpoint.verify import newest_whole
from imdm_scale.errors import UserError
from imdm_scale.hf.export import DTYPES, RANKS, export_source, load_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM

NAMES = {AVERAGE: "moving averages", MASTER: "as trained"}


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    kind: str | None,
    dtype: str | None,
    max_shard_size: int | str,
    check: bool,
    say: Callable[[str], None],
) -> None:
    """Write the folder `out`, and compare its logits with those of the checkpoint's weights.

    Args:
        checkpoint: a run's folder, whose newest whole checkpoint is taken, or a checkpoint.
        kind: `manifest.AVERAGE` or `manifest.MASTER`; None takes the averages where there are any.
        dtype: of the stored weights; None is that of the training.
        say: prints a line.

    Raises:
        UserError: no checkpoint is whole, it has no such weights, the disk refuses, or the written model computes
            something else.
    """
    folder, manifest, passed_over = newest_whole(checkpoint)
    for line in passed_over:
        say(f"passed over {line}")
    kind = kind or (AVERAGE if AVERAGE in manifest.kinds else MASTER)
    if kind not in manifest.kinds:
        raise UserError(f"{folder} has no averaged weights; leave --ema out.")
    config, rank_V, tokenizer_files = read_description(folder)
    stored = DTYPES[dtype or manifest.config.get("train", {}).get("precision", "fp32")]
    with CheckpointReader(folder, manifest) as reader:

        def source(name: str) -> Tensor:
            if name == RANKS:
                assert rank_V is not None, "the configuration names an order"
                return rank_V
            return reader.whole(kind, name)

        export_source(
            source,
            config,
            out,
            tokenizer_files=tokenizer_files,
            facts=_facts(manifest, NAMES[kind]),
            dtype=stored,
            max_shard_size=max_shard_size,
        )
        say(f"{folder.name}, {NAMES[kind]}: written to {out} as {str(stored).removeprefix('torch.')}")
        if check:
            model = ImdmForMaskedLM(config)
            model.load_state_dict({name: source(name) for name in model.state_dict()})
            say(same_logits(load_folder(out), model.to(stored).eval(), out))


def _facts(manifest: Manifest, weights: str) -> dict[str, object]:
    if not manifest.config or manifest.data is None:
        return {"weights": weights, **manifest.made_by}
    return run_facts(
        manifest.config["method"]["name"],
        manifest.step,
        manifest.data,
        manifest.made_by.get("began as", "unknown"),
        weights,
        manifest.made_by,
    )
