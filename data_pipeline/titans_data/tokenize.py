"""Tokenizers behind one small interface: bytes, a BPE trained on the corpus, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from titans_data.errors import DataError

END_OF_DOCUMENT = "<|endofdocument|>"
KIND_NAME = "titans_tokenizer.json"
TOKENIZER_NAME = "tokenizer.json"
# Names under which well-known tokenizers keep their end-of-document token, tried in this order.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<end_of_text>")
_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 4 * _PIECE_CHARACTERS


class Tokenizer(Protocol):
    """Text to token ids and back. Encoding adds no special token and never yields `end_of_document`."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_document(self) -> int:
        """The id that the dataset puts after every document."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the serialized tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One 1-d uint32 array of ids per text."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; the end-of-document token is spelled out."""

    def save(self, folder: str | Path) -> None:
        """Write the files that `load_tokenizer` reads into a folder, which is made if needed."""


class BytesTokenizer:
    """The 256 byte values and one end-of-document token."""

    vocab_size = 257
    end_of_document = 256

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(_kind_text("bytes", self.end_of_document).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        end = END_OF_DOCUMENT.encode()
        values = np.asarray(ids, np.int64).tolist()
        return b"".join(bytes([i]) if i != self.end_of_document else end for i in values).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KIND_NAME).write_text(_kind_text("bytes", self.end_of_document))


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: Any, end_of_document: int) -> None:
        # A saved tokenizer may carry its model's sequence length and padding, which have no place here.
        inner.no_truncation()
        inner.no_padding()
        # A document that spells a special token must not forge one: special tokens in text are ordinary text.
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_document = end_of_document
        self.vocab_size = max(inner.get_vocab().values()) + 1

    @property
    def fingerprint(self) -> str:
        text = _kind_text("tokenizers", self.end_of_document) + self._inner.to_str()
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The library needs about 100 bytes per token while it encodes, so long texts go in pieces, a few at a time.
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        numbers: list[int] = []
        pieces: list[str] = []
        size = 0
        for number, text in enumerate(texts):
            for piece in split_long_text(text, _PIECE_CHARACTERS):
                numbers.append(number)
                pieces.append(piece)
                size += len(piece)
                if size >= _BATCH_CHARACTERS:
                    self._encode_pieces(numbers, pieces, ids)
                    numbers, pieces, size = [], [], 0
        self._encode_pieces(numbers, pieces, ids)
        return [group[0] if len(group) == 1 else np.concatenate(group) for group in ids]

    def _encode_pieces(self, numbers: list[int], pieces: list[str], ids: list[list[np.ndarray]]) -> None:
        """Append the ids of each piece to those of its text."""
        encodings = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
        for number, encoding in zip(numbers, encodings, strict=True):
            ids[number].append(np.array(encoding.ids, np.uint32))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._inner.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(folder / TOKENIZER_NAME), pretty=True)
        (folder / KIND_NAME).write_text(_kind_text("tokenizers", self.end_of_document))


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Train a byte-level BPE. The result depends on the texts alone, not on their order or on thread timing.

    A small sample may have fewer merges to learn than asked for; the tokenizer's `vocab_size` tells.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(inner, inner.token_to_id(END_OF_DOCUMENT))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load what `save` wrote, or any Hugging Face tokenizer: a tokenizer.json or a folder that has one.

    Raises DataError when there is none, when it cannot be read, or when no end-of-document token can be found in it.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise DataError(f"tokenizer {folder} does not exist: give `bytes`, `bpe`, a tokenizer.json or its folder")
    kind_path = path / KIND_NAME
    if path.is_dir() and kind_path.exists():
        kind = _read_json(kind_path)
        if kind.get("kind") == "bytes":
            return BytesTokenizer()
        if kind.get("kind") != "tokenizers" or not isinstance(kind.get("end_of_document"), int):
            raise DataError(f"{kind_path} names no kind of tokenizer this program knows: prepare the dataset again")
        return HuggingFaceTokenizer(_read_inner(path / TOKENIZER_NAME), kind["end_of_document"])
    file = path / TOKENIZER_NAME if path.is_dir() else path
    inner = _read_inner(file)
    return HuggingFaceTokenizer(inner, _find_end_of_document(file, inner))


def split_long_text(text: str, characters: int) -> Iterator[str]:
    """Cut a text into pieces of at most `characters`, where a byte-level BPE would not merge anyway if it can.

    Such a place is a single newline between two characters that are not white space. A window without one is cut at
    its end, which changes at most the one token there.
    """
    start = 0
    while len(text) - start > characters:
        end = start + characters
        newline = text.rfind("\n", start + 1, end)
        while newline != -1 and (text[newline - 1].isspace() or text[newline + 1].isspace()):
            newline = text.rfind("\n", start + 1, newline)
        cut = newline + 1 if newline != -1 else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _kind_text(kind: str, end_of_document: int) -> str:
    return json.dumps({"kind": kind, "end_of_document": end_of_document}) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): repair it or choose another tokenizer") from error
    return content if isinstance(content, dict) else {}


def _read_inner(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError(f"{path.parent} holds no {path.name}: give a tokenizer.json or a folder that has one")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer.json ({error}): repair it or choose another tokenizer") from error


def _find_end_of_document(path: Path, inner: Any) -> int:
    """The id of the end-of-sequence token that the tokenizer's own configuration names, or of a well-known name."""
    names: list[str] = []
    config_path = path.parent / "tokenizer_config.json"
    if config_path.exists():
        configured = _read_json(config_path).get("eos_token")
        name = configured.get("content") if isinstance(configured, dict) else configured
        names += [name] if isinstance(name, str) else []
    for name in (*names, *_KNOWN_ENDS):
        token = inner.token_to_id(name)
        if token is not None:
            return token
    raise DataError(
        f"{path} has no end-of-document token: name one as eos_token in a tokenizer_config.json beside it, "
        f"or add one of {', '.join(_KNOWN_ENDS)} to its vocabulary"
    )
