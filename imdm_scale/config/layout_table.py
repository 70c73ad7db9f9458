"""The layout of a run as a table."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table

from imdm_scale.config.layout import RoleLayout, RunLayout

MOST_ROWS = 16
"""Largest world in which every rank has a row of its own."""
MOST_SPANS = 4
"""Largest number of runs of consecutive ranks that a row lists."""


def layout_table(layout: RunLayout) -> Table:
    """Which rank is what for which role.

    Up to 16 ranks have a row each; of a larger world those that compute the same stages share one.
    """
    together = "" if layout.teacher is None else f", student and teacher {layout.placement}"
    table = Table(
        title=f"{layout.world_size} process{'es' * (layout.world_size > 1)}{together}", title_justify="left"
    )
    table.add_column("ranks")
    for role in layout.roles:
        table.add_column(_heading(role))
    for ranks in _rows(layout):
        table.add_row(_spans(ranks), *(_places(role, ranks) for role in layout.roles))
    return table


def _heading(role: RoleLayout) -> str:
    return (
        f"{role.role}\ntp {role.tp} x pp {role.pp}{f' x {role.virtual_stages} virtual' * (role.virtual_stages > 1)} "
        f"x dp {role.dp}, ZeRO-{role.zero_stage}\n"
        f"micro-batch {role.micro_batch_size}{', sequence parallel' * role.sequence_parallel}"
    )


def _rows(layout: RunLayout) -> list[list[int]]:
    if layout.world_size <= MOST_ROWS:
        return [[rank] for rank in range(layout.world_size)]
    stages = [{rank: role.place_of(rank).pp for rank in role.ranks} for role in layout.roles]
    rows: dict[tuple[int | None, ...], list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        rows[tuple(stage.get(rank) for stage in stages)].append(rank)
    return list(rows.values())


def _places(role: RoleLayout, ranks: list[int]) -> str:
    """What some ranks that compute one stage are for a role; nothing if they have no part in it."""
    places = [role.place_of(rank) for rank in set(ranks) & set(role.ranks)]
    if len(places) < 2:
        return "".join(map(str, places))
    replicas, shards = {place.dp for place in places}, {place.tp for place in places}
    return f"stage {places[0].pp}, {_numbered('replica', replicas)}, {_numbered('shard', shards)}"


def _numbered(noun: str, numbers: set[int]) -> str:
    return f"{noun}{'s' * (len(numbers) > 1)} {_spans(sorted(numbers))}"


def _spans(numbers: list[int]) -> str:
    """Ascending numbers as runs: `0-7, 16-23`; in the middle of many runs some are left out."""
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    if len(runs) > MOST_SPANS:
        runs = [*runs[: MOST_SPANS - 1], "...", f"{runs[-1]} ({len(numbers)} in all)"]
    return ", ".join(runs)
