"""From the spaced text of old corpora back to written English.

WikiText, the Penn Treebank, LM1B and LAMBADA come cut into words, with spaces around punctuation. Perplexities on
them are published for text in which this is undone by fixed rules, first those of Megatron-LM (arXiv 1909.08053),
then those of MDLM (arXiv 2406.07524, dataloader.py), which these functions follow to the letter, oddities included:
other rules would give other text, and perplexities that cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Replacements = Sequence[tuple[str, str]]
Patterns = Sequence[tuple[re.Pattern[str], str]]

WIKITEXT_WORDS: Replacements = (
    (" @-@ ", "-"),  # WikiText's marks within numbers and compounds
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
WIKITEXT_PAIRS: Patterns = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    )
)
WIKITEXT_REST: Replacements = (
    ("= = = =", "===="),  # headings
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

PTB_WORDS: Replacements = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (" N ", " 1 "),
    (" N ", " 1 "),  # neighbours share a space: the first pass leaves every other
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B_ADDRESSES: Replacements = (("http : / / ", "http://"), ("https : / / ", "https://"))
LM1B_WORDS: Patterns = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", r"? "),
        (r" \?$", r"?"),
        (r" ! ", r"! "),
        (r" !$", r"!"),
        (r" , ", r", "),
        (r" : ", r": "),
        (r" ; ", r"; "),
        (r" / ", r"/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"\$ ", r"$"),
        (r"£ ", r"£"),
    )
)


def wikitext(text: str) -> str:
    """WikiText-2 and WikiText-103."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)  # the published rule, which was meant to keep the digit
    text = _replace(text, WIKITEXT_WORDS)
    text = _substitute(text, WIKITEXT_PAIRS)
    return _replace(text, WIKITEXT_REST)


def ptb(text: str) -> str:
    """The Penn Treebank of language modelling, in which N stands for a number and <unk> for a rare word."""
    return _replace(text, PTB_WORDS)


def lm1b(text: str) -> str:
    """The One Billion Word Benchmark. It takes out spaces and nothing else."""
    return _substitute(_replace(text, LM1B_ADDRESSES), LM1B_WORDS)


def lambada(text: str) -> str:
    """OpenAI's variant of LAMBADA: straight quotation marks, and a line feed before the text."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """The arXiv and PubMed articles of scientific_papers."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
    "scientific_papers": scientific_papers,
}
"""By name, as `SourceSpec.detokenizer` has it."""


def _replace(text: str, replacements: Replacements) -> str:
    for old, new in replacements:
        text = text.replace(old, new)
    return text


def _substitute(text: str, patterns: Patterns) -> str:
    for pattern, replacement in patterns:
        text = pattern.sub(replacement, text)
    return text
