"""The README.md of an exported model: what it is, how it was made and how to use it."""

from __future__ import annotations

from collections.abc import Mapping

from .configuration_imdm import ImdmConfig

CARD_FILE = "README.md"

USE = """\
## Use

Needs torch and transformers only; the code is in the folder, hence `trust_remote_code`.

```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained("DIR", trust_remote_code=True)
ids = model.generate_text(num_samples=4, num_steps=8, seed=0)
```
"""

TOKENIZER = """
Its tokenizer is in the folder, too: `AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)`, which for a
`tokenizer.model` needs the packages sentencepiece and protobuf and reads unigram models only.
"""

EVALUATION = """
## Evaluation

A few-step sampler has to be judged by perplexity and entropy together, since low perplexity alone can mean monotony;
in imdm_scale:

    python tools/evaluate.py generate --model DIR --steps 1 2 4 8 16 32
    python tools/evaluate.py likelihood --model DIR
"""


def model_card(facts: Mapping[str, object], config: ImdmConfig, hashes: Mapping[str, str]) -> str:
    """The text of the card, a pure function of its arguments.

    Args:
        facts: how the model was made, such as method, updates, data, source, versions; each a line of a table, in
            this order. None leaves a line out.
        config: the model's.
        hashes: file of weights -> SHA-256.
    """
    kind = "infinite mask diffusion model" if config.noise_dim else "masked diffusion model"
    if config.num_masks:
        kind = f"masked diffusion model of {config.num_masks} masks"
    network = (
        f"{config.num_layers} layers of width {config.hidden_size} with {config.num_heads} heads, blocks of "
        f"{config.length} tokens, {config.vocab_size} token ids (mask {config.mask_token_id})"
    )
    rows = {"kind": kind, "network": network, "sampler": config.sampler, **facts}
    rows |= {f"SHA-256 of {name}": digest for name, digest in hashes.items()}
    return "".join(
        (
            "---\nlibrary_name: transformers\npipeline_tag: fill-mask\n",
            "tags:\n- masked-diffusion\n- text-generation\n---\n\n# ",
            kind[0].upper() + kind[1:],
            "\n\nA language model that writes all positions of a text in parallel, in as few steps as wanted ",
            "(MDLM, arXiv 2406.07524; IMDM, arXiv 2605.10518).\n\n## How it was made\n\n| | |\n|---|---|\n",
            *(f"| {name} | {_cell(value)} |\n" for name, value in rows.items() if value is not None),
            "\n",
            USE,
            TOKENIZER if config.tokenizer_fingerprint else "",
            EVALUATION,
        )
    )


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return " ".join(str(value).split()).replace("|", "\\|")
