"""The dataset card: what a prepared folder holds, and the check that it still does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from titans_data.errors import DataError

FORMAT_VERSION = 2
CARD_NAME = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")
FORMATS = ("stdlib", "text", "jsonl", "parquet", "huggingface")


@dataclass(frozen=True)
class PrepareOptions:
    """How a corpus becomes a dataset. Two datasets with equal options over an equal corpus are byte-identical.

    Raises DataError when a value is not allowed.
    """

    format: str
    """One of FORMATS."""
    source: str | None = None
    """A file or folder; for `huggingface` a `save_to_disk` folder or a hub name, optionally `name:config`;
    None for `stdlib`."""
    text_column: str = "text"
    """The column (JSON key) that holds the text, for jsonl, parquet and huggingface."""
    tokenizer: str = "bpe"
    """`bytes`, `bpe` (trained on this corpus), or the path of a tokenizer.json or of a folder that has one."""
    vocab_size: int = 4096
    """Vocabulary to train, for `bpe` only: 256 bytes, the end-of-document token and the merges."""
    tokenizer_sample_bytes: int = 8 * 1024 * 1024
    """Upper bound on the text that `bpe` trains on, sampled evenly from the whole corpus."""
    validation_fraction: float = 0.01
    """Share of the documents held out, chosen by a hash of their content."""
    deduplicate: bool = False
    """Whether only the first of equal texts, in corpus order, is kept."""
    min_characters: int | None = None
    """Leave out documents with fewer characters. This and the following filters are off when None."""
    max_characters: int | None = None
    """Leave out documents with more characters."""
    max_compression_ratio: float | None = None
    """Leave out documents whose UTF-8 is more than so many times what zlib needs: repetition, boilerplate."""
    min_compression_ratio: float | None = None
    """Leave out documents whose UTF-8 is less than so many times what zlib needs: noise, base64."""
    max_repeated_lines: float | None = None
    """Leave out documents with a larger share of their characters in lines seen before in the document."""
    page_tokens: int = 8192
    """Tokens per page, the unit of storage and of reading."""
    shard_bytes: int = 64 * 1024 * 1024
    """Upper bound on the size of one shard file."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DataError(f"format is {self.format!r}: choose one of {', '.join(FORMATS)}")
        if self.format == "stdlib" and self.source is not None:
            raise DataError(
                f"source is {self.source!r} but format stdlib reads the running interpreter's own library: "
                "leave source out or choose another format"
            )
        if self.format != "stdlib" and not self.source:
            raise DataError(f"format {self.format} has no source: name the file or folder to read")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 1 << 24:
            raise DataError(
                f"vocab_size is {self.vocab_size}: bpe needs 257 (256 bytes and the end-of-document token) to {1 << 24}"
            )
        if self.tokenizer_sample_bytes < 1:
            raise DataError(f"tokenizer_sample_bytes is {self.tokenizer_sample_bytes}: give at least 1")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise DataError(f"validation_fraction is {self.validation_fraction}: give a number from 0 to below 1")
        for name in ("min_characters", "max_characters", "max_compression_ratio", "min_compression_ratio"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError(f"{name} is {value}: give a number above 0, or leave it out to filter nothing")
        if self.max_repeated_lines is not None and not 0.0 <= self.max_repeated_lines <= 1.0:
            raise DataError(
                f"max_repeated_lines is {self.max_repeated_lines}: give a share from 0 to 1, or leave it out"
            )
        if not 1 <= self.page_tokens <= 1 << 24:
            raise DataError(f"page_tokens is {self.page_tokens}: give a whole number from 1 to {1 << 24}")
        # A page takes at most 4 bytes per token and 4 per document start; MDS stores offsets in 32 bits.
        smallest = 8 * self.page_tokens + 4096
        if not smallest <= self.shard_bytes < 1 << 32:
            raise DataError(
                f"shard_bytes is {self.shard_bytes}: with page_tokens={self.page_tokens} give {smallest} to {2**32 - 1}"
            )


@dataclass
class CorpusCounts:
    """What became of the corpus: every document met is kept, empty, filtered or a duplicate."""

    documents: int = 0
    """Documents kept."""
    bytes_read: int = 0
    """UTF-8 bytes of all documents met, kept or not."""
    empty: int = 0
    """Documents dropped because they hold no character but white space."""
    first_empty: str | None = None
    """Where the first of them is: a file, `file:line` from 1, or `file[row]` from 0."""
    replaced_documents: int = 0
    """Documents, dropped ones included, in which undecodable bytes were replaced by U+FFFD."""
    replaced_sequences: int = 0
    """Undecodable byte sequences replaced, over all documents."""
    first_replaced: str | None = None
    """Where the first of them is."""
    garbled_lines: int = 0
    """JSONL lines skipped because they hold no JSON object with a text."""
    garbled: list[str] = field(default_factory=list)
    """`file:line` of the first few of them."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Documents that a filter dropped, by the name of its option."""
    duplicates: int = 0
    """Documents dropped because the same text came earlier in the corpus."""


@dataclass(frozen=True)
class FileCard:
    name: str
    """Path below the dataset folder, with forward slashes."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardCard(FileCard):
    tokens: int
    """Tokens in its pages, all of which are full but the last of the shard."""


@dataclass(frozen=True)
class SplitCard:
    documents: int
    tokens: int
    """Length of the split's token stream, end-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of the split's text as it was encoded.

    An end-of-document token is a predicted token that stands for no bytes, so over a whole split
    bits per byte = mean loss in nats per token * tokens / bytes / ln 2.
    """
    index: FileCard
    shards: tuple[ShardCard, ...]
    """In the order of the stream."""


@dataclass(frozen=True)
class DatasetCard:
    """The content of dataset.json."""

    options: PrepareOptions
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_document: int
    dtype: str
    """Storage type of a token: `uint16` or `uint32`."""
    page_tokens: int
    counts: CorpusCounts
    splits: dict[str, SplitCard]
    fingerprint: str
    """sha256 over the shard digests and the tokenizer fingerprint."""
    format_version: int = field(default=FORMAT_VERSION)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / CARD_NAME).write_text(text, encoding="utf-8")


def dataset_fingerprint(tokenizer_fingerprint: str, splits: dict[str, SplitCard]) -> str:
    """sha256 over the tokenizer fingerprint and the name and digest of every shard."""
    digest = hashlib.sha256(tokenizer_fingerprint.encode())
    for split in SPLITS:
        for shard in splits[split].shards:
            digest.update(f"\n{shard.name} {shard.sha256}".encode())
    return digest.hexdigest()


def describe_file(folder: Path, name: str) -> FileCard:
    """The card of the file `name` below `folder`, read in full."""
    path = folder / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileCard(name, path.stat().st_size, digest)


def load_card(folder: str | Path) -> DatasetCard:
    """Read the card of a prepared dataset.

    Raises DataError when the folder or its card is missing, unreadable or of another format version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: run `titans-dist prepare` first or correct the path")
    path = folder / CARD_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {CARD_NAME}: run `titans-dist prepare` first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove the folder and prepare it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: prepare the dataset again"
        )
    try:
        return _card_from_json(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a dataset card ({error!r}): prepare the dataset again") from error


def _card_from_json(content: dict[str, Any]) -> DatasetCard:
    splits = {
        name: SplitCard(
            documents=split["documents"],
            tokens=split["tokens"],
            bytes=split["bytes"],
            index=FileCard(**split["index"]),
            shards=tuple(ShardCard(**shard) for shard in split["shards"]),
        )
        for name, split in content["splits"].items()
    }
    plain = {
        item.name: content[item.name]
        for item in fields(DatasetCard)
        if item.name not in ("options", "counts", "splits")
    }
    return DatasetCard(
        options=PrepareOptions(**content["options"]), counts=CorpusCounts(**content["counts"]), splits=splits, **plain
    )


def check_sizes(folder: Path, split: SplitCard) -> None:
    """Compare the files of a split with their sizes on the card; DataError names the first that differs."""
    for file in (split.index, *split.shards):
        path = folder / file.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path} cannot be found ({error.strerror}): restore it, or remove {folder} and prepare it again"
            ) from None
        if size != file.size_bytes:
            raise DataError(
                f"{path} has {size} bytes, its card says {file.size_bytes}: "
                f"restore it, or remove {folder} and prepare it again"
            )


def verify(folder: str | Path) -> DatasetCard:
    """Check every file of a dataset against its card by sha256, and return the card.

    Reads the whole dataset. Raises DataError naming the first file that differs.
    """
    from titans_data.tokenize import load_tokenizer

    folder = Path(folder)
    card = load_card(folder)
    for split in card.splits.values():
        check_sizes(folder, split)
        for file in (split.index, *split.shards):
            if describe_file(folder, file.name).sha256 != file.sha256:
                raise DataError(
                    f"{folder / file.name} does not have the sha256 on its card: "
                    f"restore it, or remove {folder} and prepare it again"
                )
    if load_tokenizer(folder / TOKENIZER_FOLDER).fingerprint != card.tokenizer_fingerprint:
        raise DataError(
            f"{folder / TOKENIZER_FOLDER} is not the tokenizer on the card: "
            f"restore it, or remove {folder} and prepare it again"
        )
    if dataset_fingerprint(card.tokenizer_fingerprint, card.splits) != card.fingerprint:
        raise DataError(
            f"{folder / CARD_NAME} contradicts its own fingerprint: restore it, or remove {folder} and prepare it again"
        )
    return card
