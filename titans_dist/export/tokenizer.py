"""The tokenizer of a run's data as files that `AutoTokenizer` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_dist.config import DataConfig

if TYPE_CHECKING:
    from titans_data.tokenize import Tokenizer

UNBOUNDED = 10**30
"""What `transformers` takes for "no limit on the length"."""


def run_tokenizer(data: DataConfig, saved: dict[str, Any] | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the run's tokens are of, or None and why there is none.

    saved: the state of the data in the checkpoint, which says what tokenizer it has to be.
    """
    from titans_data import DataError, load_tokenizer
    from titans_data.card import TOKENIZER_FOLDER
    from titans_data.files import local_folder

    if data.format in ("tokens", "synthetic"):
        return None, f"data={data.format} says of none"
    paths = list(data.sources.values()) if data.format == "mixture" else [data.path]
    wanted = {source["tokenizer"] for source in (saved or {}).get("sources", [])} - {None}
    reason = "the run has read no dataset"
    for path in paths:
        try:
            found = load_tokenizer(local_folder(path, data.cache, int(data.cache_gb * 1e9)) / TOKENIZER_FOLDER)
        except DataError as error:
            reason = str(error)
            continue
        if not wanted or found.fingerprint in wanted:
            return found, ""
        reason = f"that of {path} is not the one the run was trained with"
    return None, reason


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    As in training, no token is added to a text, and a text that spells a special token is ordinary text.
    """
    from titans_data.tokenize import TOKENIZER_NAME, BytesTokenizer

    inner = _bytes() if isinstance(tokenizer, BytesTokenizer) else tokenizer._inner  # type: ignore[attr-defined]
    inner.save(str(folder / TOKENIZER_NAME))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": inner.id_to_token(tokenizer.end_of_document),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": UNBOUNDED,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _bytes() -> Any:
    """BytesTokenizer in the library's terms: a byte-level BPE that has learned nothing, so that ids are byte values."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from titans_data.tokenize import END_OF_DOCUMENT

    inner = Tokenizer(models.BPE({_character(value): value for value in range(256)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return inner


def _character(value: int) -> str:
    """How a byte-level tokenizer writes a byte: as itself where it can be printed, else from U+0100 on, in order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if value in printed:
        return chr(value)
    return chr(0x100 + [other for other in range(256) if other not in printed].index(value))
