"""Datasets of the Hugging Face hub, and local copies of their repositories."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imdm_scale.config.nearest import near_files, nearest
from imdm_scale.data.source_corpus import Corpus, build, explanation, in_words
from imdm_scale.data.source_files import files_below, identity_of
from imdm_scale.data.source_readers import kind_of
from imdm_scale.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ANSWER_SECONDS = 10.0
"""How long the hub may take to answer at all. The libraries try for minutes."""


def open_copy(path: Path, name: str | None, column: str, streaming: bool, label: str) -> Corpus:
    """A local copy of a dataset's repository.

    Args:
        name: the dataset's configuration; None takes the default one.

    Raises:
        UserError: it cannot be loaded.
    """
    identity = identity_of(files_below(path), name)
    try:
        return _open(str(path.absolute()), name, column, streaming, label, identity)
    except Exception as error:
        if explained := explanation(error):
            raise explained from None
        raise UserError(
            f"The README.md of {label} lists configurations, as in a copy of a repository of the hub, but it cannot be "
            f"loaded as one ({in_words(error)}); set name to one of the configurations, or copy it again."
        ) from error


def open_hub(name_on_hub: str, name: str | None, column: str, streaming: bool, label: str) -> Corpus:
    """A dataset of the hub; what the library has in its cache is enough when the hub cannot be reached.

    Raises:
        UserError: nothing of that name can be had, here or there.
    """
    path = Path(name_on_hub).expanduser()
    if not HUB_NAME.fullmatch(name_on_hub) or kind_of(path) is not None:
        raise UserError(f"path is {name_on_hub}, which does not exist; {near_files(path)}")
    unreachable = _unreachable()
    try:
        with _offline(unreachable is not None):
            return _open(name_on_hub, name, column, streaming, label, None)
    except Exception as error:
        if explained := explanation(error):
            raise explained from None
        neighbours = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        like = [f" (only {path.parent / near})" for near in nearest(path.name, neighbours)[:1]]
        taken = (
            f"path is {name_on_hub}, which does not exist here{''.join(like)} and was taken for a dataset on the "
            "Hugging Face hub"
        )
        if unreachable is not None:
            raise UserError(
                f"{taken}, but the hub cannot be reached ({unreachable}), nor is it in the cache of datasets; connect "
                "to the network, or give a local file or folder."
            ) from error
        raise UserError(
            f"{taken}, but cannot be loaded from there ({in_words(error)}); check the path, or on the dataset's page "
            "its name, its configurations (set name to one) and who may read it."
        ) from error


def _open(
    path: str, name: str | None, column: str, streaming: bool, label: str, identity: str | None
) -> Corpus:
    import datasets

    builder = datasets.load_dataset_builder(path, name)
    rows, counts = build(builder, streaming)
    if identity is None:  # the hash is that of the repository's commit
        identity = hashlib.sha256(repr((path, builder.config_id, builder.hash)).encode()).hexdigest()
    return Corpus(label, rows, counts, column, streaming, identity)


def _unreachable() -> str | None:
    """Why the hub cannot be reached; None if it answers, whatever it answers."""
    import datasets
    from huggingface_hub import get_session

    if datasets.config.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(datasets.config.HF_ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # of the HTTP library that huggingface_hub happens to use
        return f"{datasets.config.HF_ENDPOINT}: {in_words(error)}"
    return None


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Lets `datasets` look into its cache alone, instead of asking the hub again and again."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
