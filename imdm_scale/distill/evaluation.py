"""What every evaluation begins with: a model, a folder that keeps its results, and a network over all ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from imdm_scale.distill.exported_network import Sharing, check_sharing, load_network
from imdm_scale.distill.training_data import told_by
from imdm_scale.evaluate.exported import ExportedModel, describe
from imdm_scale.evaluate.folder import EvaluationFolder
from imdm_scale.evaluate.provenance import provenance
from imdm_scale.parallel.engine import Teacher

MAIN_RANK = 0
"""Reads and writes the files; the others only compute."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation under way, as one rank sees it."""

    model: ExportedModel
    sharing: Sharing
    dtype: str
    out: Path
    device: torch.device
    console: Console
    """Silent on all ranks but the main one."""
    folder: EvaluationFolder | None
    """On the main rank."""

    def load_network(self) -> tuple[Teacher, Tensor | None]:
        """See `exported_network.load_network`."""
        with self.console.status(f"loading {self.model.folder}"):
            return load_network(self.model, self.sharing, self.dtype)


@contextmanager
def open_evaluation(
    arguments: argparse.Namespace, argv: Sequence[str], device: torch.device
) -> Iterator[Evaluation]:
    """Checks the model and opens the folder. Collective; `argv` is the command, to be recorded.

    Raises:
        UserError: on the main rank: no such model, ranks that cannot share it so, or a folder of another evaluation.
    """
    is_main, num_processes = dist.get_rank() == MAIN_RANK, dist.get_world_size()
    model = told_by(MAIN_RANK, lambda: describe(arguments.model))
    sharing = Sharing(arguments.tp, arguments.pp, arguments.zero, arguments.batch_size)
    check_sharing(sharing, model, num_processes)
    out = arguments.out or default_out(arguments.model)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with ExitStack() as stack:
        folder = None
        if is_main:
            invocation = {
                **provenance(argv, num_processes, what),
                "seed": arguments.seed,
                "dtype": arguments.dtype,
                "tp": sharing.tp,
                "pp": sharing.pp,
                "zero": sharing.zero_stage,
            }
            folder = stack.enter_context(EvaluationFolder.open(out, invocation))
            folder.claim("model", {"weights": model.weights_sha256, "dtype": arguments.dtype})
            folder.note("model_folder", str(model.folder.resolve()))
            model.tokenizer.save(out / "tokenizer")
        dist.barrier()
        console = Console(quiet=not is_main, highlight=False)
        yield Evaluation(model, sharing, arguments.dtype, out, device, console, folder)


def default_out(model: Path) -> Path:
    """Where the results go: beside the model where that is part of a run, else below runs/."""
    folder = model.resolve()
    if (folder.parent / "config.yaml").is_file():
        return model.parent / f"evaluation-{folder.name}"
    return Path("runs") / f"evaluation-{folder.name}"
