"""Hugging Face tokenizers: from the files of a folder, or of the hub, to the tokenizer.

`tokenizer.json` describes a tokenizer wholly and is taken as it is. transformers' AutoTokenizer would rather build it
anew after the class that `tokenizer_config.json` names (a cased BERT becomes an uncased one), and fails on folders
that hold a vocabulary alone. So only the names of special tokens come from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from imdm_scale.config.nearest import did_you_mean
from imdm_scale.data.huggingface_tokenizer import FILE_NAME, HuggingFaceTokenizer
from imdm_scale.data.special_tokens import (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    named_in,
    read_object,
    special_tokens,
)
from imdm_scale.data.tokenizer import MASK_TOKEN
from imdm_scale.errors import UserError

BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")
BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer")
BYTE_LEVEL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
"""GPT-2's special tokens, of which its files say nothing."""
WORDPIECE_FILES = ("vocab.txt",)
WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
WORDPIECE_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
"""BERT's special tokens."""
MODEL_CONFIG_FILE = "config.json"
HUB_FILES = (
    FILE_NAME,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    MODEL_CONFIG_FILE,
    *BYTE_LEVEL_FILES,
    *WORDPIECE_FILES,
    "tokenizer.model",
)
LLADA_MASK_TOKEN = "<|mdm_mask|>"
"""A token of LLaDA's vocabulary that its files do not name as the mask."""
HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's answer."""


def holds_huggingface(folder: Path) -> bool:
    """Whether a folder has the files of a fast tokenizer, or a vocabulary that makes one."""
    return any(
        all((folder / name).exists() for name in names)
        for names in ((FILE_NAME,), BYTE_LEVEL_FILES, WORDPIECE_FILES)
    )


def load_huggingface(folder: Path, setting: str, bos: str | None, eos: str | None) -> HuggingFaceTokenizer:
    """The tokenizer of a folder for which `holds_huggingface`.

    Raises:
        UserError: a file is damaged, the vocabulary is of a kind that cannot be read, or there is no BOS or EOS.
    """
    try:
        backend, named = _backend(folder)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) < max(len(vocabulary), 2):
            raise ValueError(
                f"its vocabulary has {len(vocabulary)} pieces, {len(set(vocabulary.values()))} ids"
            )
        chosen = {kind: token for kind, token in named.items() if token in vocabulary}
        chosen["bos_token"] = _boundary("begin", "--bos", bos, chosen, ("bos_token", "cls_token"), vocabulary)
        chosen["eos_token"] = _boundary("end", "--eos", eos, chosen, ("eos_token", "sep_token"), vocabulary)
        chosen["mask_token"] = _mask(named, vocabulary)
        return HuggingFaceTokenizer(_description(backend, chosen["mask_token"]), chosen)
    except UserError as error:
        raise UserError(f"{setting} {folder}: {error}") from None
    except Exception as error:  # the backend raises nothing more precise
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{setting} {folder} holds no tokenizer that can be read ({reason}); copy the folder again."
        ) from None


def download(name: str, setting: str, patterns: Sequence[str] = HUB_FILES) -> Path:
    """The folder with the files of a name on the hub, by default the tokenizer's, kept in the hub's cache.

    Raises:
        UserError: there is no such name, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT)  # snapshot_download would wait for ever
            is_reached, reason = True, ""
        except Exception as error:  # of the network, of the hub or of the name
            is_reached, reason = False, _first_line(error)
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not is_reached))
    except Exception as error:
        raise UserError(
            f"{setting} is {name}, which is no local path, and the Hugging Face hub does not give it "
            f"({reason or _first_line(error)}); give a local folder, another name, or try again with network."
        ) from None


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer that the files describe, and kind -> token of the special tokens that they name."""
    config, named = read_object(folder / CONFIG_FILE), special_tokens(folder)
    bounded = ({"bos_token", "cls_token"} & named.keys()) and ({"eos_token", "sep_token"} & named.keys())
    model_type = read_object(folder / MODEL_CONFIG_FILE).get("model_type")
    if not bounded and model_type is not None:
        named = _tokens_of_class(folder) | named
    if (folder / FILE_NAME).exists():
        return tokenizers.Tokenizer.from_file(str(folder / FILE_NAME)), named
    class_name = config.get("tokenizer_class") or _class_of(model_type)
    if all((folder / name).exists() for name in BYTE_LEVEL_FILES):
        _check_class(class_name, BYTE_LEVEL_CLASSES, BYTE_LEVEL_FILES)
        return _byte_level(folder, config), BYTE_LEVEL_TOKENS | named
    _check_class(class_name, WORDPIECE_CLASSES, WORDPIECE_FILES)
    named = WORDPIECE_TOKENS | named
    return _wordpiece(folder, config, named["unk_token"]), named


def _tokens_of_class(folder: Path) -> dict[str, str]:
    """The special tokens that transformers gives to the model's tokenizer where the files name none."""
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # it knows no such class, so that nothing is named
        return {}
    return named_in(fast.special_tokens_map)


def _class_of(model_type: str | None) -> str | None:
    """The class of tokenizer that transformers has for a type of model; None where it is not known."""
    if model_type is None:
        return None
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type)


def _check_class(name: str | None, known: tuple[str, ...], files: tuple[str, ...]) -> None:
    if name is not None and name.removesuffix("Fast") not in known:
        raise UserError(
            f"its tokenizer is a {name}, of which {' and '.join(files)} alone do not say how it works; write its "
            f"{FILE_NAME} with AutoTokenizer.from_pretrained(...).save_pretrained(...), which needs a fast tokenizer."
        )


def _byte_level(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer, from the files of its vocabulary."""
    vocabulary, merges = models.BPE.read_file(*(str(folder / name) for name in BYTE_LEVEL_FILES))
    made = {first + second for first, second in merges}
    unmade = [piece for piece in vocabulary if len(piece) > 1 and piece not in made]
    if len(unmade) > len(vocabulary) // 10:
        raise ValueError(
            f"merges.txt makes no {unmade[-1]!r} and {len(unmade) - 1} more pieces of vocab.json"
        )
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    add_prefix_space = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wordpiece(folder: Path, config: Mapping[str, Any], unk_token: str) -> tokenizers.Tokenizer:
    """BERT's tokenizer, from the file of its vocabulary.

    Where nothing says whether it lower-cases its text, the vocabulary does: by having no piece with capitals.
    """
    vocabulary = models.WordPiece.read_file(str(folder / WORDPIECE_FILES[0]))
    if unk_token not in vocabulary:
        raise ValueError(f"vocab.txt has no {unk_token}, so that it is no WordPiece vocabulary")
    words = (piece for piece in vocabulary if not piece.startswith("["))
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", all(word == word.lower() for word in words)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _boundary(
    verb: str,
    flag: str,
    given: str | None,
    named: Mapping[str, str],
    kinds: tuple[str, str],
    vocabulary: Mapping[str, int],
) -> str:
    """The token that begins or ends a text: the given one, else the first that is named of two kinds."""
    if given is not None and given not in vocabulary:
        some = ", ".join(sorted(vocabulary, key=vocabulary.__getitem__)[:5])
        nearby = did_you_mean(given, vocabulary, f"it has pieces such as {some}.")
        raise UserError(f"{flag} is {given}, which is no token of this tokenizer; {nearby}")
    token = given or named.get(kinds[0]) or named.get(kinds[1])
    if token is None:
        raise UserError(
            f"this tokenizer names no token to {verb} a text with; name one of its tokens with {flag} of "
            f"tools/prepare_data.py, or as {kinds[0]} in {CONFIG_FILE}."
        )
    return token


def _mask(named: Mapping[str, str], vocabulary: Mapping[str, int]) -> str:
    """The vocabulary's own mask token, or the name of a new one."""
    usual = (named.get("mask_token", MASK_TOKEN), MASK_TOKEN, "<mask>", LLADA_MASK_TOKEN)
    return next((token for token in usual if token in vocabulary), usual[0])


def _description(backend: tokenizers.Tokenizer, mask: str) -> str:
    """`tokenizer.json` with the mask as a special token, its id the largest if it is new.

    Without what makes ids depend on more than the text: truncation, padding, and dropout of merges.
    """
    description = json.loads(backend.to_str())
    description.update(truncation=None, padding=None)
    model = description["model"]
    if "dropout" in model:
        model["dropout"] = None
    ids = backend.get_vocab(with_added_tokens=True)
    mask_id = ids.get(mask, max(ids.values()) + 1)
    if mask not in {token["content"] for token in description["added_tokens"]}:
        if mask_id > len(ids) and isinstance(model["vocab"], dict):
            model["vocab"][mask] = mask_id  # some ids have no piece, and the backend would reuse one in use
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        description["added_tokens"].append({"id": mask_id, "content": mask, "special": True, **flags})
    completed = tokenizers.Tokenizer.from_str(json.dumps(description))
    if completed.token_to_id(mask) != mask_id:
        raise ValueError(f"the mask token {mask} cannot be given the id {mask_id}")
    return completed.to_str()
