"""Real text to compare with: prepared data, text that is prepared now, or a synthetic task.

L positions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imdm_scale.data.folder import FetchSettings, PreparedFolder
from imdm_scale.data.manifest import FILE_NAME, Manifest
from imdm_scale.data.prepare import PrepareOptions, prepare
from imdm_scale.data.source_files import find_files, is_hub_copy, is_saved_dataset
from imdm_scale.data.sources import SourceSpec
from imdm_scale.data.synthetic import SyntheticTask
from imdm_scale.data.synthetic_source import BOUNDARY_TOKEN, is_synthetic, prepare_synthetic, synthetic_source
from imdm_scale.errors import UserError
from imdm_scale.evaluate.exported import ExportedModel


@dataclass(frozen=True)
class ReferenceText:
    """Blocks of the model's length in the model's token ids. The same on every rank."""

    name: str
    """As it was given."""
    url: str
    """Where the prepared blocks are."""
    manifest: Manifest
    fetch: FetchSettings
    task: SyntheticTask | None
    """The law, where it is that of a synthetic task."""

    def blocks(self, split: str, max_blocks: int) -> np.ndarray:
        """The first blocks of a split, (at most `max_blocks`, L).

        Raises:
            UserError: there is no such split, or a shard cannot be read.
        """
        return PreparedFolder(self.url, self.manifest, self.fetch).first_blocks(split, max_blocks)


def reference_text(
    path: str | None, model: ExportedModel, out: Path, fetch: FetchSettings, whole: bool = False
) -> ReferenceText:
    """What `--data` names. Text, and the blocks of a task, are prepared below `out`, once.

    Args:
        path: a prepared folder or URL, a file or folder of text, synthetic://...; None is the packaged books.
        whole: whether text without a validation split of its own is that split as a whole, rather than cut.

    Raises:
        UserError: it cannot be read, or its ids are not the model's.
    """
    length, tokenizer = model.architecture.length, model.tokenizer
    name = "the packaged books" if path is None else path
    place = out / "data" / hashlib.sha256(repr((path, whole)).encode()).hexdigest()[:12]
    if path is not None and is_synthetic(path):
        source = synthetic_source(path, length)
        manifest = prepare_synthetic(source, place)
        _check(name, manifest, model)
        return ReferenceText(name, str(place), manifest, fetch, source.task)
    if path is not None and ("://" in path or (Path(path) / FILE_NAME).is_file()):
        folder = PreparedFolder.open(path, fetch)
        _check(name, folder.manifest, model)
        return ReferenceText(name, folder.url, folder.manifest, fetch, None)
    if tokenizer.token(tokenizer.bos_id) == BOUNDARY_TOKEN:
        raise UserError(
            f"--data is {name}, but the ids of {model.folder} are no words: it was trained on a synthetic task; "
            "name it, as in --data synthetic://all_equal?vocab_size=32."
        )
    source_spec, options = SourceSpec(path), PrepareOptions(length=length)
    if model.bos_id is None:
        options = PrepareOptions(length=length, packing="plain")
    if whole and path is not None and _has_no_splits(Path(path)):
        source_spec = SourceSpec(path, train="none", valid="train")
        options = PrepareOptions(length=length, packing=options.packing, documents_per_group=0)
    return ReferenceText(name, str(place), prepare(source_spec, tokenizer, options, place), fetch, None)


def _has_no_splits(path: Path) -> bool:
    if not path.exists() or (path.is_dir() and (is_hub_copy(path) or is_saved_dataset(path))):
        return False
    return set(find_files(path).splits) == {"train"}


def _check(name: str, manifest: Manifest, model: ExportedModel) -> None:
    its, own, length = manifest.tokenizer, model.tokenizer, model.architecture.length
    if its.fingerprint != own.fingerprint:
        raise UserError(
            f"the token ids of --data {name} (tokenizer {its.fingerprint[:12]}, {its.vocab_size} ids) and of "
            f"{model.folder} (tokenizer {own.fingerprint[:12]}, {own.vocab_size} ids) mean different words; give "
            "text, or data that the model's tokenizer has prepared."
        )
    if manifest.length != length:
        raise UserError(
            f"--data {name} has blocks of {manifest.length} tokens, but {model.folder} was trained on blocks of "
            f"{length}; prepare them with --length {length}."
        )
