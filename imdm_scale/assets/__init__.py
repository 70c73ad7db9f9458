"""Files that ship with the package, so that everything works offline.

`tools/make_assets.py` makes the corpus and the tokenizer again; SOURCES.md says where they come from.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent
"""The folder of the shipped files."""

CORPUS = {split: ASSETS / f"corpus.{split}.jsonl.xz" for split in ("train", "valid")}
"""The embedded corpus, one JSON object {"id", "source", "text"} a line."""

TOKENIZER = ASSETS / "tokenizer.model"
"""The embedded sentencepiece model."""

TEACHER = ASSETS / "teacher"
"""The embedded teacher, an exported tiny masked diffusion model."""
