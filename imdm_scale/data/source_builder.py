"""Files of text as a dataset of the `datasets` library, converted once to Arrow in its cache, or streamed.

The library's own readers of JSON and text are not used: the one refuses files whose other fields differ from line to
line, the other knows no blank line but an empty one, and neither says which line is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa

from imdm_scale.data.source_readers import Kind, Unit, read_texts

COLUMN = "text"
"""The one column of the dataset, whatever the files call it."""


@dataclass
class TextFilesConfig(datasets.BuilderConfig):
    """Which files, and how they are read."""

    files: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """By split, in order."""
    kind: Kind = "text"
    column: str = "text"
    unit: Unit = "paragraph"


class TextFiles(datasets.ArrowBasedBuilder):
    """One column of text from files of one kind."""

    BUILDER_CONFIG_CLASS = TextFilesConfig

    def _info(self) -> datasets.DatasetInfo:
        # large_string: a text may be larger than the 2 GiB that the offsets of string reach
        return datasets.DatasetInfo(features=datasets.Features({COLUMN: datasets.Value("large_string")}))

    def _split_generators(self, dl_manager: object) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files)})
            for split, files in self.config.files.items()
        ]

    def _generate_tables(self, files: list[Path]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        for i, file in enumerate(files):
            texts_of_file = read_texts(file, self.config.kind, self.config.column, self.config.unit)
            for j, texts in enumerate(texts_of_file):
                if len(texts):
                    yield (i, j), pa.table({COLUMN: texts})
