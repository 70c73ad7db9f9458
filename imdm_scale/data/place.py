"""Where a run stands in its data: one integer, and what it counts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from imdm_scale.data.stream import Stream
from imdm_scale.errors import UserError

FILE_NAME = "data.json"
"""The file beside the weights of a checkpoint."""


@dataclass(frozen=True)
class Place:
    """The state of a stream."""

    samples: int
    """Samples of the run consumed so far; the next one has this number."""
    seed: int
    """Seed of the order."""
    data_hash: str
    """Hash of the manifest, or of the mixture of several."""

    @classmethod
    def of(cls, stream: Stream, samples: int) -> Place:
        """The place of a stream after so many samples."""
        return cls(samples, stream.seed, stream.data_hash)

    def write(self, folder: Path) -> None:
        """Writes `data.json` into `folder`."""
        (folder / FILE_NAME).write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Place:
        """The place that a checkpoint's `data.json` tells.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            return cls(**json.loads((folder / FILE_NAME).read_bytes()))
        except OSError as error:
            raise UserError(
                f"data.continue_from {folder} has no {FILE_NAME} ({error.strerror}); "
                "name a folder under checkpoints/ of a run, or its student/."
            ) from None
        except (ValueError, TypeError):
            raise UserError(f"{folder / FILE_NAME} is damaged; name another checkpoint.") from None

    def check(
        self,
        stream: Stream,
        origin: str = "data.continue_from",
        remedy: str = "leave data.continue_from out to begin at the first sample",
    ) -> None:
        """Refuses to go on in another order than the one whose samples were counted.

        Args:
            origin: where this place comes from, in words.
            remedy: what to do if the data cannot be had, in words.

        Raises:
            UserError: the data or the seed differ.
        """
        if self.data_hash != stream.data_hash:
            raise UserError(
                f"{origin} counts {self.samples} samples of data {self.data_hash[:12]}, but data.path "
                f"(with its weights) is {stream.data_hash[:12]}; name the same prepared data, or {remedy}."
            )
        if self.seed != stream.seed:
            raise UserError(
                f"{origin} counts samples in the order of seed {self.seed}, but seed is {stream.seed}; "
                f"set seed={self.seed}, or {remedy}."
            )
