"""`tools/generate_pairs.py` from its arguments to a folder of pairs. Shared by all ranks of one program."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from rich.console import Console

from imdm_scale.config.tree import DataConfig
from imdm_scale.data.folder import PreparedFolder
from imdm_scale.data.manifest import FORMAT, Manifest, TokenizerRecord
from imdm_scale.data.output_folder import writing
from imdm_scale.data.pair_console import PairReport
from imdm_scale.data.pair_folder import PairFolder, data_lock
from imdm_scale.data.pairs import DIGIT_BITS, PACKING, pack_pairs
from imdm_scale.data.prepare_console import say
from imdm_scale.data.prepared_corpus import PreparedCorpus
from imdm_scale.data.shards import shard_dtype
from imdm_scale.data.stream import TokenStream
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.exported_network import Sharing, check_sharing, load_network
from imdm_scale.distill.pair_generation import PairMaker
from imdm_scale.distill.training_data import fetch_settings, told_by
from imdm_scale.errors import UserError
from imdm_scale.evaluate.exported import ExportedModel, describe
from imdm_scale.evaluate.reference import ReferenceText, reference_text

MAIN_RANK = 0
"""Reads and writes the files; the others only compute."""
SHUFFLE_WINDOW = 8


def make_pairs(arguments: argparse.Namespace, device: torch.device) -> None:
    """Makes the shards of this program's part that are missing, and the manifest if they were the last. Collective.

    Raises:
        UserError: on the main rank: a model or data that cannot be used, ranks that cannot share the network so, a
            folder of other pairs, or a disk that refuses.
    """
    console = Console(quiet=dist.get_rank() != MAIN_RANK, highlight=False)
    model = told_by(MAIN_RANK, lambda: _model(arguments.model))
    sharing = Sharing(arguments.tp, arguments.pp, arguments.zero, arguments.batch_size)
    check_sharing(sharing, model, dist.get_world_size())
    with console.status("preparing the data"):
        reference = told_by(MAIN_RANK, lambda: _reference(arguments, model))
    folder = PairFolder(arguments.out, _plan(arguments, model, reference))
    is_done = told_by(MAIN_RANK, lambda: folder.begin(model.tokenizer))
    if is_done:
        say(console, f"{arguments.out} holds these {folder.num_pairs:,} pairs already")
        return
    mine = range(arguments.part, folder.num_shards, arguments.parts)
    missing = told_by(MAIN_RANK, lambda: [shard for shard in mine if not folder.is_finished(shard)])
    if missing:
        maker = _maker(arguments, model, sharing, reference)
        there = sum(len(folder.numbers(shard)) for shard in mine if shard not in missing)
        total = sum(len(folder.numbers(shard)) for shard in mine)
        with PairReport(console, there, total) as report:
            for shard in missing:
                _make_shard(folder, shard, maker, report)
    _finish(folder, arguments.parts, console)


def _make_shard(folder: PairFolder, shard: int, maker: PairMaker, report: PairReport) -> None:
    """One shard, unless another program is at it."""
    is_main = dist.get_rank() == MAIN_RANK
    with folder.claimed(shard) if is_main else nullcontext(False) as mine:
        # Another program may have finished it since the list was made.
        if not told_by(MAIN_RANK, lambda: mine and not folder.is_finished(shard)):
            report.add(len(folder.numbers(shard)), made=False)
            return
        pairs = maker.make(folder.numbers(shard), report.add)
        if is_main:
            folder.write(shard, pack_pairs(pairs))


def _finish(folder: PairFolder, parts: int, console: Console) -> None:
    left = told_by(MAIN_RANK, folder.finish)
    if not left:
        say(console, f"{folder.num_pairs:,} pairs written to {folder.out}")
    elif parts == 1:
        raise UserError(
            f"{len(left)} shards of {folder.out} (the first is {left[0]}) are being made by another program; give the "
            "same command again when that has ended."
        )
    else:
        say(
            console,
            f"this part is done; {len(left)} of {folder.num_shards} shards are other parts', the last of which will "
            "write the manifest",
        )


def _model(path: Path) -> ExportedModel:
    model = describe(path)
    if model.architecture.sampler != "ancestral":
        raise UserError(
            f"--model {path} was trained to be sampled as {model.architecture.sampler}, so that its text is a function "
            "of the noise already, but couplings are drawn by ancestral sampling; give a teacher, or a student of "
            "im_sdtt."
        )
    return model


def _reference(arguments: argparse.Namespace, model: ExportedModel) -> ReferenceText:
    """The data; where they are prepared first, one program after the other finds them so."""
    out: Path = arguments.out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(data_lock(out)):
        reference = reference_text(arguments.data, model, out, fetch_settings(DataConfig()))
    if reference.manifest.holds_pairs or "train" not in reference.manifest.splits:
        raise UserError(
            f"--data {reference.name} has no train split of text; give text, or prepare the data with one."
        )
    return reference


def _plan(arguments: argparse.Namespace, model: ExportedModel, reference: ReferenceText) -> Manifest:
    """What decides about the pairs, and nothing else."""
    shape = model.architecture
    data = arguments.data
    return Manifest(
        format=FORMAT,
        length=shape.length,
        dtype=shard_dtype(max(shape.vocab_size, 1 << DIGIT_BITS)),
        shuffle_window=SHUFFLE_WINDOW,
        tokenizer=TokenizerRecord.of(model.tokenizer),
        source={
            "data": str(Path(data).resolve()) if data is not None and "://" not in data else data,
            "model": str(model.folder.resolve()),
        },
        options={
            "packing": PACKING,
            "num_pairs": arguments.num_pairs,
            "shard_pairs": arguments.shard_pairs,
            "seed": arguments.seed,
            "steps": arguments.steps,
            "temperature": arguments.temperature,
            "t_min": arguments.t_min,
            "dtype": arguments.dtype,
            "framed": reference.manifest.options["packing"] != "plain",
            "noise": [shape.noise_kind, shape.noise_scale] if shape.noise_dim else None,
            "data_hash": reference.manifest.hash,
            "model_hash": model.weights_sha256,
        },
        splits={},
    )


def _maker(
    arguments: argparse.Namespace, model: ExportedModel, sharing: Sharing, reference: ReferenceText
) -> PairMaker:
    network, _ = load_network(model, sharing, arguments.dtype)
    text = PreparedFolder(reference.url, reference.manifest, reference.fetch)
    return PairMaker(
        network=network,
        stream=TokenStream(PreparedCorpus(text, "train"), arguments.seed),
        settings=SamplerSettings(arguments.steps, temperature=arguments.temperature),
        seed=arguments.seed,
        t_min=arguments.t_min,
        batch_size=arguments.batch_size,
    )
