"""Ranks, places and groups of every layout; refusals of the impossible ones."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imdm_scale.config.layout import RoleLayout, RunLayout, run_layout
from imdm_scale.config.splits import ImpossibleLayout, Split, nearest_splits
from imdm_scale.config.tree import Config
from imdm_scale.errors import UserError


def config(**parallel: int) -> Config:
    """24 layers and 16 heads, batches that suit any number of replicas; `student_tp=2` and so on."""
    made = Config()
    made.model.size = "1b"
    made.train.micro_batch_size, made.train.global_batch_size = 1, 720720
    for name, value in parallel.items():
        role, size = name.split("_")
        setattr(getattr(made.parallel, role), size, value)
    return made


@st.composite
def layouts(draw: st.DrawFn) -> RunLayout:
    """Any possible layout of up to 1,024 ranks."""
    made = config()
    made.model.num_heads, made.model.num_layers, made.model.hidden_size = 64, 48, 128
    sizes = {}
    for role in ("student", "teacher"):
        tp = draw(st.sampled_from([1, 2, 4, 8]))
        pp = draw(st.sampled_from([1, 2, 3, 4, 8]))
        parallel = getattr(made.parallel, role)
        parallel.tp, parallel.pp, sizes[role] = tp, pp, tp * pp
    made.teacher.placement = draw(st.sampled_from(["colocated", "disaggregated"]))
    if made.teacher.placement == "colocated":
        made.method.name = draw(st.sampled_from(["im_sdtt", "pretrain"]))
        unit = sizes["student"] * sizes["teacher"]
        world_size = unit * draw(st.integers(1, max(1, 1024 // unit)))
    else:
        counts = [size * draw(st.integers(1, 512 // size)) for size in sizes.values()]
        world_size = sum(counts)
        listed = draw(st.booleans())
        shuffled = draw(st.permutations(range(world_size))) if listed else []
        made.teacher.ranks = list(shuffled[: counts[1]]) if listed else counts[1]
    return run_layout(made, world_size, zero_stage=draw(st.integers(0, 3)))


@settings(max_examples=60)
@given(layouts())
def test_places_and_groups(layout: RunLayout) -> None:
    for role in layout.roles:
        assert list(role.ranks) == sorted(set(role.ranks))
        assert role.tp * role.pp * role.dp == len(role.ranks)
        places = {rank: role.place_of(rank) for rank in role.ranks}
        assert len(set(places.values())) == len(role.ranks)
        for rank, place in places.items():
            assert role.rank_at(place.pp, place.dp, place.tp) == rank
            assert (place.pp < role.pp, place.dp < role.dp, place.tp < role.tp) == (True, True, True)
        for groups, size, shared in (
            (role.tp_groups, role.tp, ("pp", "dp")),
            (role.dp_groups, role.dp, ("pp", "tp")),
            (role.pp_groups, role.pp, ("dp", "tp")),
            (role.model_groups, role.tp * role.pp, ("dp",)),
        ):
            assert sorted(chain(*groups)) == list(role.ranks)
            for group in groups:
                assert len(group) == size
                for axis in shared:
                    assert len({getattr(places[rank], axis) for rank in group}) == 1
        index = {rank: i for i, rank in enumerate(role.ranks)}
        for group in role.tp_groups:
            assert [index[rank] for rank in group] == list(range(index[group[0]], index[group[0]] + role.tp))
        for group in role.pp_groups:
            assert [places[rank].pp for rank in group] == list(range(role.pp))


@settings(max_examples=60)
@given(layouts())
def test_who_has_which_role(layout: RunLayout) -> None:
    world = list(range(layout.world_size))
    if layout.teacher is None or layout.placement == "colocated":
        assert all(list(role.ranks) == world for role in layout.roles)
    else:
        assert sorted([*layout.student.ranks, *layout.teacher.ranks]) == world


def test_tensor_parallel_innermost_and_stages_outermost() -> None:
    role = run_layout(config(student_tp=2, student_pp=2), 8, 3).student
    assert role.tp_groups == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert role.dp_groups == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert role.pp_groups == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert role.model_groups == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_a_rank_without_the_role_has_no_place() -> None:
    with pytest.raises(ValueError, match="not in"):
        RoleLayout("teacher", (2, 3), 1, 1, False, 0, 1).place_of(0)


@pytest.mark.parametrize(
    ("ranks", "world_size", "teacher"),
    [(None, 4, (2, 3)), (None, 5, (3, 4)), (1, 4, (3,)), (3, 4, (1, 2, 3)), ([2, 0], 4, (0, 2))],
)
def test_the_teachers_ranks(ranks: int | list[int] | None, world_size: int, teacher: tuple[int, ...]) -> None:
    made = config()
    made.teacher.placement, made.teacher.ranks = "disaggregated", ranks
    layout = run_layout(made, world_size, 3)
    assert layout.placement == "disaggregated" and layout.teacher is not None
    assert layout.teacher.ranks == teacher


@pytest.mark.parametrize(
    ("student", "given_stage", "teacher"),
    [(0, None, 0), (1, None, 0), (2, None, 0), (3, None, 3), (3, 0, 0), (1, 3, 3)],
)
def test_zero_stage_of_the_teacher(student: int, given_stage: int | None, teacher: int) -> None:
    made = config()
    made.teacher.zero_stage = given_stage
    layout = run_layout(made, 2, student)
    assert [role.zero_stage for role in layout.roles] == [student, teacher]


def test_micro_batch_size_of_the_teacher() -> None:
    made = config()
    made.train.micro_batch_size = 4
    assert [role.micro_batch_size for role in run_layout(made, 1, 0).roles] == [4, 4]
    made.teacher.micro_batch_size = 8
    assert [role.micro_batch_size for role in run_layout(made, 1, 0).roles] == [4, 8]


def test_pretrain_leaves_the_teachers_settings_alone() -> None:
    made = config(teacher_tp=5, teacher_pp=7)
    made.method.name = "pretrain"
    made.teacher.placement, made.teacher.ranks = "disaggregated", 99
    layout = run_layout(made, 2, 3)
    assert (layout.teacher, layout.placement, layout.student.dp) == (None, "colocated", 2)


def test_labels() -> None:
    assert (
        run_layout(config(), 2, 3).label(1)
        == "student: stage 0, replica 1, shard 0; teacher: stage 0, replica 1, shard 0"
    )
    made = config(student_tp=2)
    made.teacher.placement = "disaggregated"
    assert run_layout(made, 4, 3).label(1) == "student: stage 0, replica 0, shard 1"
    assert run_layout(made, 4, 3).label(3) == "teacher: stage 0, replica 1, shard 0"


def refusal(made: Config, world_size: int) -> ImpossibleLayout:
    with pytest.raises(ImpossibleLayout) as caught:
        run_layout(made, world_size, 3)
    assert isinstance(caught.value, UserError)
    return caught.value


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_splits_that_the_network_does_not_allow(role: str) -> None:
    assert str(refusal(config(**{f"{role}_tp": 3}), 8)) == (
        f"parallel.{role}.tp is 3, which does not divide the 16 attention heads; nearest on 8 ranks: "
        "tp 4 x pp 1, tp 2 x pp 1 or tp 8 x pp 1."
    )
    error = refusal(config(**{f"{role}_pp": 5}), 8)
    assert f"parallel.{role}.pp is 5, which does not divide the 24 layers" in str(error)
    assert error.near[0] == f"parallel.{role}.tp=1 parallel.{role}.pp=4"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_splits_that_the_ranks_do_not_allow(role: str) -> None:
    made = config(**{f"{role}_tp": 4})
    assert str(refusal(made, 6)) == (
        f"parallel.{role}.tp x parallel.{role}.pp is 4 x 1 = 4, which does not divide the {role}'s 6 ranks; "
        "nearest on 6 ranks: tp 2 x pp 1, tp 1 x pp 1 or tp 2 x pp 3, or start 4 or 8 processes."
    )
    assert str(refusal(made, 1)).endswith("1 rank; nearest on 1 rank: tp 1 x pp 1, or start 4 processes.")


def test_processes_are_counted_for_both_roles() -> None:
    assert "start 12 processes" in str(refusal(config(student_tp=4, teacher_pp=3), 8))
    made = config(student_tp=4, teacher_pp=3)
    made.method.name = "pretrain"
    assert "start 4 or 8 processes" in str(refusal(made, 6))


def test_ranks_of_a_role_on_its_own() -> None:
    made = config(student_tp=4)
    made.teacher.placement, made.teacher.ranks = "disaggregated", 2
    assert "the student's 7 ranks" in str(refusal(made, 9))
    assert str(refusal(made, 9)).endswith("or give it 4 or 8 ranks by teacher.ranks.")
    assert str(refusal(made, 7)).endswith("or give it 4 ranks by teacher.ranks.")
    assert "by teacher.ranks" not in str(refusal(made, 4))


def test_sequence_parallel() -> None:
    made = config()
    made.parallel.student.sequence_parallel = True
    assert str(refusal(made, 2)) == (
        "parallel.student.sequence_parallel is true, but parallel.student.tp is 1, and tensor-parallel ranks share "
        "it; nearest on 2 ranks: tp 2 x pp 1, or set parallel.student.sequence_parallel=false."
    )
    assert str(refusal(made, 1)).endswith("share it; set parallel.student.sequence_parallel=false.")
    made.parallel.student.tp, made.model.length = 4, 66
    assert "parallel.student.tp, 4, does not divide model.length, 66; nearest on 4 ranks: tp 2" in str(
        refusal(made, 4)
    )
    made.parallel.student.tp = 2
    assert run_layout(made, 4, 3).student.sequence_parallel


def test_virtual_stages() -> None:
    made = config(student_pp=2)
    made.model.num_layers, made.parallel.student.virtual_stages = 6, 2
    assert str(refusal(made, 2)).startswith(
        "parallel.student.pp x parallel.student.virtual_stages is 2 x 2, which does not divide the 6 layers; "
    )
    made.parallel.student.virtual_stages = 3
    assert run_layout(made, 2, 3).student.virtual_stages == 3
    made.parallel.student.pp = 1
    assert str(refusal(made, 1)) == (
        "parallel.student.virtual_stages is 3, but parallel.student.pp is 1, and only a pipeline has stages; set "
        "parallel.student.virtual_stages=1."
    )


@pytest.mark.parametrize(
    ("ranks", "world_size", "words", "near"),
    [
        (0, 4, "teacher.ranks is 0, but of 4 processes", "1"),
        (4, 4, "must leave the student at least 1; give 1 to 3 of them.", "3"),
        (-1, 2, "give 1 of them.", "1"),
        ([], 4, "teacher.ranks is [], but of 4 processes the teacher needs at least 1", "1"),
        ([0, 1], 2, "give 1 of them.", "1"),
        ([4], 4, "rank 4 is none of the 4 processes; list different ranks from 0 to 3", "1"),
        ([-1, 2], 4, "rank -1 is none of the 4 processes", "2"),
        ([2, 2], 4, "a rank is named twice", "2"),
    ],
)
def test_ranks_that_the_teacher_cannot_have(
    ranks: int | list[int], world_size: int, words: str, near: str
) -> None:
    made = config()
    made.teacher.placement, made.teacher.ranks = "disaggregated", ranks
    error = refusal(made, world_size)
    assert words in str(error) and error.near == (f"teacher.ranks={near}",)


def test_placement_and_ranks_agree() -> None:
    made = config()
    made.teacher.ranks = 1
    assert "teacher.ranks is 1, but teacher.placement is colocated" in str(refusal(made, 2))
    made.teacher.placement = "disaggregated"
    assert "there is 1 process; start at least 2" in str(refusal(made, 1))


@settings(max_examples=100)
@given(st.integers(1, 1024), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_what_is_named_as_possible_is_possible(
    num_ranks: int, tp: int, pp: int, sequence_parallel: bool
) -> None:
    made = config(student_tp=tp, student_pp=pp)
    made.parallel.student.sequence_parallel = sequence_parallel
    near = nearest_splits(made, "student", num_ranks)
    assert len(near) == len(set(near))
    for split in near:
        made.parallel.student.tp, made.parallel.student.pp = split.tp, split.pp
        run_layout(made, num_ranks, 3)
    if near and Split(tp, pp) not in near:
        made.parallel.student.tp, made.parallel.student.pp = tp, pp
        assert refusal(made, num_ranks).near == tuple(
            f"parallel.student.tp={split.tp} parallel.student.pp={split.pp}" for split in near[:8]
        )


def test_splits_that_suit_the_batch_come_first() -> None:
    made = config(student_tp=3)
    made.train.global_batch_size = 2
    near = nearest_splits(made, "student", 8)
    suits = [8 // (split.tp * split.pp) in (1, 2) for split in near]
    assert suits == sorted(suits, reverse=True) and True in suits and False in suits
