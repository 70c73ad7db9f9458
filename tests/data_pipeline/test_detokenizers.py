"""Detokenizers: what the published rules make of typical text, and what they leave alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdm_scale.data.detokenizers import DETOKENIZERS

EXAMPLES = [
    (
        "wikitext",
        " = Robert Boulter = \n \n Robert Boulter is an English film , television and theatre actor . He had a "
        "guest @-@ starring role in 2000 . \n",
        " = Robert Boulter =\n\nRobert Boulter is an English film, television and theatre actor. He had a "
        "guest-starring role in 2000.\n",
    ),
    (
        "wikitext",
        "1 @,@ 500 copies ( 2 @.@ 5 ) ; why ? it : yes ! no",
        "1,500 copies (2.5); why? it: yes! no",
    ),
    ("wikitext", "[ a ] { b } \" c d \" ' e ' 20 ° C", "[a] {b} \"c d\" 'e' 20°C"),
    ("wikitext", " = = = = Deep = = = = ", " ==== Deep ==== "),
    ("wikitext", "players ' own , all N of", "players' own, all 1 of"),
    ("wikitext", "in /' 9/ it", "in /'[0-9]/ it"),  # the published rule's own slip
    (
        "ptb",
        "the company 's chairman does n't expect N N N of the $ N bonds to be <unk> and\\/or sold # N at the "
        "traders ' desk",
        "the company's chairman doesn't expect 1 1 1 of the $1 bonds to be ? and/or sold #1 at the traders' desk",
    ),
    ("ptb", "one \n two", "one\ntwo"),
    (
        "lm1b",
        '" It \'s a shame , " he said ( in 2008 ) : see http : / / example.com / news ; cost $ 5 or £ 3 . Why ? No '
        "! They won [ again ] .",
        '"It\'s a shame," he said (in 2008): see http://example.com/news; cost $5 or £3. Why? No! They won [again] .',
    ),
    ("lm1b", "and he won .", "and he won."),
    ("lm1b", "did he ?", "did he?"),
    ("lm1b", "https : / / a ' b c ' !", "https://a 'b c'!"),
    ("lambada", " “ he said , ” no . ” ", '\n" he said , " no . "'),
    ("scientific_papers", "we show ( see [ 1 ] ) that it 's so .", "we show (see [1]) that it's so."),
]

WORDS = [
    "s",
    "a",
    "word",
    "'",
    '"',
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ":",
    ";",
    ".",
    "!",
    "?",
    ",",
    "=",
    "°",
    "$",
    "£",
    "/",
]
SPACED = st.lists(st.sampled_from([*WORDS, " ", " ", "\n", "http : / / "]), max_size=40).map(" ".join)


@pytest.mark.parametrize(("name", "text", "expected"), EXAMPLES)
def test_examples(name, text, expected):
    assert DETOKENIZERS[name](text) == expected


@given(SPACED)
def test_lm1b_takes_out_spaces_only(text):
    assert DETOKENIZERS["lm1b"](text).replace(" ", "") == text.replace(" ", "")


@given(SPACED)
def test_wikitext_takes_out_white_space_only_where_nothing_is_marked(text):
    assert "".join(DETOKENIZERS["wikitext"](text).split()) == "".join(text.split())


@given(st.lists(st.sampled_from(["N", "a", "<unk>"]), max_size=12))
def test_ptb_puts_a_digit_for_every_number_between_words(words):
    expected = ["1" if word == "N" else "?" if word == "<unk>" else word for word in words]
    assert DETOKENIZERS["ptb"](f" {' '.join(words)} ") == f" {' '.join(expected)} "


@given(
    st.lists(st.sampled_from(["written", "English", "has", "no", "spaces", "around", "3,000"]), min_size=1)
)
@pytest.mark.parametrize("name", ["wikitext", "ptb", "lm1b", "scientific_papers"])
def test_written_text_is_left_alone(name, words):
    text = " ".join(words) + ", or so (it's true); is it? See https://example.com."
    assert DETOKENIZERS[name](text) == text


@given(st.text())
def test_lambada_begins_with_one_line_feed(text):
    detokenized = DETOKENIZERS["lambada"](text)
    assert detokenized[0] == "\n" and detokenized[1:] == detokenized[1:].strip()
    assert not {"“", "”"} & set(detokenized)
