"""An exported model as a checkpoint that is cut for a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from imdm_scale.checkpoint.manifest import MASTER
from imdm_scale.checkpoint.reader import CheckpointReader
from imdm_scale.checkpoint.self_check import same_logits
from imdm_scale.checkpoint.split import write_split
from imdm_scale.checkpoint.stored_model import locate_model, open_model
from imdm_scale.data.tokenizer import holds_tokenizer, load_tokenizer
from imdm_scale.evaluate.provenance import versions
from imdm_scale.hf.export import RANKS, load_folder
from imdm_scale.hf.modeling_imdm import ImdmForMaskedLM


def from_hf(model: str, out: Path, tp: int, pp: int, check: bool, say: Callable[[str], None]) -> None:
    """Write the checkpoint `out` of a model, in its stored type, and compare their logits.

    Args:
        model: a folder, or a name on the hub (`stored_model.locate_model`).
        tp, pp: tensor- and pipeline-parallel size; any other can read it, too.
        say: prints a line.

    Raises:
        UserError: there is no such model, it cannot be cut so, or the disk refuses.
    """
    stored = open_model(locate_model(model, "--model"))
    dtype = stored.tensor("token_embedding.weight").dtype
    rank_V = stored.tensor(RANKS).to(torch.int64) if RANKS in stored.shapes else None
    with TemporaryDirectory() as scratch:
        if holds_tokenizer(stored.tokenizer_folder):
            load_tokenizer(stored.tokenizer_folder, setting="--model").save(Path(scratch))
        manifest = write_split(
            out,
            stored.config,
            lambda kind, name: stored.tensor(name),
            tp=tp,
            pp=pp,
            dtype=dtype,
            rank_V=rank_V,
            tokenizer_files=sorted(Path(scratch).iterdir()),
            made_by={"source": str(model), "SHA-256 of its weights": stored.sha256(), "versions": versions()},
        )
    say(f"{model}: written to {out} for tp {tp} x pp {pp}, {len(manifest.pieces)} files of weights")
    if check:
        config = stored.config
        copy = ImdmForMaskedLM(config)
        with CheckpointReader(out, manifest) as reader:
            tensors = dict(reader.tensors(MASTER))
        if rank_V is not None:
            tensors[RANKS] = rank_V
        copy.load_state_dict(tensors)
        say(same_logits(copy.to(dtype).eval(), load_folder(stored.folder), out))
