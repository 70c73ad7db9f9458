"""Split expressions against Python's slices and the `datasets` library, and each corpus' own splits."""

from __future__ import annotations

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.source_splits import NONE, Selection, hub_rule, local_rule, select
from imdm_scale.errors import UserError

RULE = {"train": "train", "valid": NONE}
BOUND = st.none() | st.integers(-300, 300)


def resolve(expression, counts):
    return select("train", {"train": expression, "valid": NONE}, RULE, counts, "the corpus")


def own(rule, counts):
    given = {"train": None, "valid": None}
    return tuple(select(role, given, rule, counts, "the corpus") for role in ("train", "valid"))


def shown(bound):
    return "" if bound is None else bound


@given(BOUND, BOUND, st.integers(0, 250))
def test_bounds_are_those_of_a_slice(start, stop, count):
    left = range(count)[start:stop]
    try:
        selection = resolve(f"train[{shown(start)}:{shown(stop)}]", {"train": count})
    except UserError as error:
        assert "no document is left" in str(error) and len(left) == 0
    else:
        assert range(selection.start, selection.stop) == left


@given(st.none() | st.integers(0, 100), st.none() | st.integers(0, 100), st.integers(1, 1000))
def test_per_cents_are_those_of_the_library(start, stop, count):
    bounds = ["" if bound is None else f"{bound}%" for bound in (start, stop)]
    expression = f"train[{bounds[0]}:{bounds[1]}]"
    (expected,) = datasets.ReadInstruction.from_spec(expression).to_absolute({"train": count})
    try:
        selection = resolve(expression, {"train": count})
    except UserError:
        assert expected.from_ >= expected.to
    else:
        assert (selection.start, selection.stop) == (expected.from_, expected.to)


@given(st.integers(1, 99), st.integers(2, 1000))
def test_a_per_cent_counted_from_the_end_cuts_where_its_complement_does(percent, count):
    """Also where it rounds to nothing: the library then takes everything."""
    rest = round(percent * count / 100)
    expected = {"train[:-{}%]": (0, count - rest), "train[-{}%:]": (count - rest, count)}
    for expression, (start, stop) in expected.items():
        if start < stop:
            assert resolve(expression.format(percent), {"train": count}) == Selection("train", start, stop)
        else:
            with pytest.raises(UserError, match="no document is left"):
                resolve(expression.format(percent), {"train": count})


@pytest.mark.parametrize(
    ("expression", "start", "stop"), [("train", 0, None), ("train[5:]", 5, None), ("train[:9]", 0, 9)]
)
def test_a_count_is_not_always_needed(expression, start, stop):
    assert resolve(expression, {"train": None}) == Selection("train", start, stop)


@pytest.mark.parametrize("bounds", ["-1:", ":-1", "5%:", ":5%"])
def test_a_count_that_is_needed_and_not_known(bounds):
    with pytest.raises(UserError, match=r"needs the number of documents.*bounds counted from the start"):
        resolve(f"train[{bounds}]", {"train": None})


@pytest.mark.parametrize(
    "expression", ["", "train[", "train[5]", "train[a:b]", "train[1:2:3]", "train+test", "train[:5 %]"]
)
def test_what_is_no_expression(expression):
    with pytest.raises(
        UserError, match=r"train is '.*', but must be the name of a split, or part of one such as"
    ):
        select(
            "train", {"train": None, "valid": None}, {"train": expression, "valid": NONE}, {"train": 9}, "it"
        )


def test_split_names():
    counts = {"train": 9, "dev": 5}
    assert resolve(" dev [ 1 : 3 ] ", counts) == Selection("dev", 1, 3)
    assert resolve("validation", counts) == Selection("dev", 0, 5)
    with pytest.raises(
        UserError,
        match=r"split 'trian', but the corpus has the splits \['dev', 'train'\]; did you mean train",
    ):
        resolve("trian", counts)
    assert resolve(NONE, counts) is None


@given(st.integers(2, 1000))
def test_the_last_hundredth_is_held_out(count):
    train, valid = own(local_rule({"train": count}), {"train": count})
    assert train == Selection("train", 0, valid.start)
    assert valid == Selection("train", count - max(1, count // 100), count)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_hold_one_out(count):
    with pytest.raises(
        UserError, match=rf"There are {count} document\(s\) in the corpus, and at least 2.*blank lines"
    ):
        own(local_rule({"train": count}), {"train": count})


@pytest.mark.parametrize(
    ("path", "names", "train", "valid"),
    [
        ("Skylion007/openwebtext", ["train"], ("train", 0, 900_000), ("train", 900_000, 1_000_000)),
        ("dvruette/lm1b", ["train", "test"], "train", "test"),
        ("Salesforce/wikitext", ["test", "train", "validation"], "train", "validation"),
        ("ptb_text_only", ["test", "train", "validation"], "train", "validation"),
        ("EleutherAI/lambada_openai", ["test"], None, "test"),
        ("some/text", ["train", "validation", "test"], "train", "validation"),
        ("some/text", ["train", "test"], ("train", 0, 990_000), ("train", 990_000, 1_000_000)),
        ("stas/openwebtext-10k", ["train"], ("train", 0, 990_000), ("train", 990_000, 1_000_000)),
    ],
)
def test_splits_of_the_literature(path, names, train, valid):
    counts = dict.fromkeys(names, 1_000_000)
    expected = [
        Selection(x, 0, 1_000_000) if isinstance(x, str) else x and Selection(*x) for x in (train, valid)
    ]
    assert list(own(hub_rule(path, counts), counts)) == expected


@pytest.mark.parametrize("names", [["validation", "test"], ["valid", "test"], ["dev", "test"], ["test"]])
def test_a_local_corpus_has_its_own_validation_split(names):
    assert local_rule(dict.fromkeys(["train", *names], 5)) == {"train": "train", "valid": names[0]}


def test_validation_text_is_not_trained_on_by_default():
    rule, counts = local_rule({"train": 200}), {"train": 200}
    with pytest.raises(
        UserError, match="train is 'train', which shares documents of it with what valid is by default"
    ):
        for role in ("train", "valid"):
            select(role, {"train": "train", "valid": None}, rule, counts, "it")
    with pytest.raises(UserError, match=r"valid is 'train\[:10\]', which shares.*set train too"):
        select("train", {"train": None, "valid": "train[:10]"}, rule, counts, "it")
    apart = {"train": "train[:100]", "valid": None}
    assert select("valid", apart, rule, counts, "it") == Selection("train", 198, 200)
    on_purpose = {"train": "train", "valid": "train"}
    assert select("valid", on_purpose, rule, counts, "it") == Selection("train", 0, 200)
