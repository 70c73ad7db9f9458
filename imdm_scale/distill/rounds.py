"""Rounds of doubling step size: whenever one ends, the student becomes the teacher (SDTT, arXiv 2410.21035)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """A stretch of updates with one teacher."""

    index: int
    """Number of the round, from 0."""
    starts: bool
    """Whether the update asked about is the round's first."""
    teacher_steps: float | None = None
    """Sampling steps whose size the teacher takes; the student learns to take half as many."""


@dataclass(frozen=True)
class HalvingRounds:
    """In round r the teacher takes steps of dt = 2^r / initial_steps."""

    initial_steps: int
    """Sampling steps of the first round's teacher."""
    steps_per_round: int
    """Updates in a round."""
    min_steps: int
    """A round whose teacher would take fewer steps is not begun."""

    def teacher_steps(self, step: int) -> float:
        """Sampling steps of the teacher at an update; its step size is one over this."""
        return self.initial_steps / 2 ** (step // self.steps_per_round)

    def at(self, step: int) -> Round | None:
        """The round of an update, None when the schedule is over."""
        teacher_steps = self.teacher_steps(step)
        if round(teacher_steps) < self.min_steps:
            return None
        return Round(
            index=step // self.steps_per_round,
            starts=step % self.steps_per_round == 0,
            teacher_steps=teacher_steps,
        )
