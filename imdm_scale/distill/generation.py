"""`tools/evaluate.py generate`: sample what is missing, then score it. Shared by all ranks.

L positions, P positions of a prefix, S samples.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from imdm_scale.config.tree import DataConfig
from imdm_scale.data.shards import shard_dtype
from imdm_scale.diffusion.sampler import SamplerSettings
from imdm_scale.distill.evaluation import MAIN_RANK, Evaluation
from imdm_scale.distill.sampling import sample_texts
from imdm_scale.distill.scoring import score
from imdm_scale.distill.training_data import fetch_settings, told_by
from imdm_scale.errors import UserError
from imdm_scale.evaluate.folder import Cell
from imdm_scale.evaluate.mauve_score import load_package
from imdm_scale.evaluate.reference import ReferenceText, reference_text

NUM_SAMPLES = 1024
"""Texts of a cell, as in the literature."""
GROWTH = 8
"""Samples are kept whenever a batch more than 1/8 of those that are there is drawn: so an interruption costs little,
and all writing together little more than the file."""


@dataclasses.dataclass(frozen=True)
class Continuations:
    """Real beginnings that samples continue; sample i continues number i // `each`.

    The defaults are those of the literature: 5 continuations of 256 beginnings of 50 tokens, cut to 100.
    """

    prefixes: int
    prefix_length: int = 50
    """Tokens, BOS included."""
    continuations: int = 5
    text_length: int = 100
    """Tokens of a text that are scored, prefix included."""


def generate(evaluation: Evaluation, arguments: argparse.Namespace) -> None:
    """Samples and scores every cell. Collective.

    Raises:
        UserError: flags that do not go together or do not suit the model or the data; a folder that holds samples
            drawn otherwise.
    """
    model, folder = evaluation.model, evaluation.folder
    sampler = _sampler(evaluation, arguments)
    continuations = _continuations(arguments, model.architecture.length)
    if arguments.mauve:
        load_package()
    fetch = fetch_settings(DataConfig())
    with evaluation.console.status("preparing the data"):
        reference = told_by(MAIN_RANK, lambda: reference_text(arguments.data, model, evaluation.out, fetch))
    prefixes_SP = None
    if continuations is not None:
        prefixes_SP = told_by(MAIN_RANK, lambda: _prefixes(reference, continuations))
    num_samples = (arguments.num_samples or NUM_SAMPLES) if prefixes_SP is None else len(prefixes_SP)
    if folder is not None:
        of_data = {} if continuations is None else {"data": reference.manifest.hash}
        given = {} if continuations is None else dataclasses.asdict(continuations)
        folder.claim("sampling", {"seed": arguments.seed, "sampler": sampler, **given, **of_data})
    cells = [
        Cell(num_steps, temperature)
        for num_steps in sorted(set(arguments.steps))
        for temperature in sorted(set(arguments.temperatures), reverse=True)
    ]
    _sample_missing(evaluation, arguments, cells, num_samples, sampler, prefixes_SP)
    score(
        evaluation,
        arguments,
        cells,
        num_samples,
        reference,
        text_length=None if continuations is None else continuations.text_length,
        each=1 if continuations is None else continuations.continuations,
    )


def _sampler(evaluation: Evaluation, arguments: argparse.Namespace) -> str:
    architecture = evaluation.model.architecture
    sampler = arguments.sampler or architecture.sampler
    if sampler != "ancestral" and architecture.noise_dim < 2:
        raise UserError(
            f"--sampler is {sampler}, which reads two dimensions of the masks' noise, but {evaluation.model.folder} "
            f"has {architecture.noise_dim}; take ancestral."
        )
    if sampler == "coupled_argmax" and set(arguments.temperatures) != {1.0}:
        raise UserError(
            "--temperatures has values other than 1, but the sampler coupled_argmax takes the likeliest tokens at any "
            "temperature; leave --temperatures out, or take --sampler coupled."
        )
    return sampler


def _continuations(arguments: argparse.Namespace, length: int) -> Continuations | None:
    """What is continued, if anything."""
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Continuations)
        if getattr(arguments, field.name) is not None
    }
    if not given:
        return None
    if "prefixes" not in given:
        flag = "--" + next(iter(given)).replace("_", "-")
        raise UserError(f"{flag} says how real text is continued, but no --prefixes are asked for; add it.")
    if arguments.num_samples is not None:
        raise UserError(
            f"--num-samples is {arguments.num_samples}, but with --prefixes there are as many samples as "
            "prefixes x continuations; leave it out."
        )
    wanted = Continuations(**given)
    if not wanted.prefix_length < wanted.text_length <= length:
        raise UserError(
            f"--prefix-length is {wanted.prefix_length} and --text-length {wanted.text_length}, but the prefix must be "
            f"shorter than the text, and that at most the model's {length} tokens; set both."
        )
    return wanted


def _prefixes(reference: ReferenceText, wanted: Continuations) -> torch.Tensor:
    blocks = reference.blocks("valid", wanted.prefixes)
    if len(blocks) < wanted.prefixes:
        raise UserError(
            f"--prefixes is {wanted.prefixes}, but the validation split of {reference.name} has {len(blocks)} blocks; "
            "ask for fewer, or give more text."
        )
    beginnings = blocks[:, : wanted.prefix_length].astype(np.int64)
    return torch.from_numpy(beginnings.repeat(wanted.continuations, axis=0))


def _sample_missing(
    evaluation: Evaluation,
    arguments: argparse.Namespace,
    cells: Sequence[Cell],
    num_samples: int,
    sampler: str,
    prefixes_SP: torch.Tensor | None,
) -> None:
    """Draws the samples that the folder does not have; the network is loaded only where there are such."""
    folder, model = evaluation.folder, evaluation.model
    there = told_by(MAIN_RANK, lambda: {cell: folder.num_samples(cell) for cell in cells})  # type: ignore[union-attr]
    if all(count >= num_samples for count in there.values()):
        return
    network, rank_V = evaluation.load_network()
    batch = arguments.batch_size * network.groups.dp_size
    for cell in cells:
        done = there[cell]
        if done >= num_samples:
            continue
        if folder is not None:
            folder.begin(cell)
        while done < num_samples:
            began = time.monotonic()
            count = min(num_samples - done, max(1, done // GROWTH // batch) * batch)
            with evaluation.console.status(f"sampling: {cell.name}, {done} of {num_samples} texts"):
                ids_SL = sample_texts(
                    network,
                    SamplerSettings(cell.num_steps, temperature=cell.temperature),
                    count,
                    arguments.batch_size,
                    arguments.seed,
                    model.bos_id,
                    first_sample=done,
                    prefixes_SP=None if prefixes_SP is None else prefixes_SP[done : done + count],
                    sampler=sampler,
                    rank_V=rank_V,
                )
            if folder is not None:
                ids = ids_SL.numpy().astype(shard_dtype(model.architecture.vocab_size))
                folder.add_samples(cell, ids, time.monotonic() - began)
            done += count
        evaluation.console.print(f"sampled {cell.name}: {num_samples} texts")
    dist.barrier()
