"""titans_data: from documents to batches of token rows.

Three steps, each usable alone:

1. `prepare` reads a corpus, trains or loads a tokenizer and writes a dataset folder (MDS shards and a card);
2. a token source (`MdsSource`, `TokenFileSource`, `SyntheticSource`, or a `SpanSource` of one) reads any span of a
   token stream;
3. `TokenDataset` (of several sources a `MixedDataset`), `Mixture`, `BatchSchedule`, `batches` and `evaluation_batches`
   turn sources into reproducible batches; `StreamSchedule` and `stream_evaluation_batches` do so in the order of the
   stream; `data_state` and `resume_mixture` carry a mixture through a checkpoint.

Importing this package is cheap: torch, streaming, tokenizers, datasets and pyarrow load when first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titans_data.card import CorpusCounts, DatasetCard, PrepareOptions, load_card, verify
    from titans_data.errors import DataError
    from titans_data.loader import MixedDataset, Rows, TokenDataset, batches, evaluation_batches
    from titans_data.mixture import Mixture, Stage, shares_of
    from titans_data.preparation import prepare
    from titans_data.schedule import BatchSchedule, RowOrder, Schedule, source_seed
    from titans_data.sources import MdsSource, TokenFileSource, TokenSource, open_source
    from titans_data.span import SpanSource
    from titans_data.state import SourceIdentity, Usage, check_sources, data_state, resume_mixture, usage
    from titans_data.streams import StreamSchedule, stream_evaluation_batches
    from titans_data.synthetic import SyntheticSource
    from titans_data.tokenize import load_tokenizer

# No name here may also be a submodule: once imported, the submodule would hide it.
_HOMES = {
    "BatchSchedule": "schedule",
    "CorpusCounts": "card",
    "DataError": "errors",
    "DatasetCard": "card",
    "MdsSource": "sources",
    "MixedDataset": "loader",
    "Mixture": "mixture",
    "PrepareOptions": "card",
    "RowOrder": "schedule",
    "Rows": "loader",
    "Schedule": "schedule",
    "SourceIdentity": "state",
    "SpanSource": "span",
    "Stage": "mixture",
    "StreamSchedule": "streams",
    "SyntheticSource": "synthetic",
    "TokenDataset": "loader",
    "TokenFileSource": "sources",
    "TokenSource": "sources",
    "Usage": "state",
    "batches": "loader",
    "check_sources": "state",
    "data_state": "state",
    "evaluation_batches": "loader",
    "load_card": "card",
    "load_tokenizer": "tokenize",
    "open_source": "sources",
    "prepare": "preparation",
    "resume_mixture": "state",
    "shares_of": "mixture",
    "source_seed": "schedule",
    "stream_evaluation_batches": "streams",
    "usage": "state",
    "verify": "card",
}

__all__ = [
    "BatchSchedule",
    "CorpusCounts",
    "DataError",
    "DatasetCard",
    "MdsSource",
    "MixedDataset",
    "Mixture",
    "PrepareOptions",
    "RowOrder",
    "Rows",
    "Schedule",
    "SourceIdentity",
    "SpanSource",
    "Stage",
    "StreamSchedule",
    "SyntheticSource",
    "TokenDataset",
    "TokenFileSource",
    "TokenSource",
    "Usage",
    "batches",
    "check_sources",
    "data_state",
    "evaluation_batches",
    "load_card",
    "load_tokenizer",
    "open_source",
    "prepare",
    "resume_mixture",
    "shares_of",
    "source_seed",
    "stream_evaluation_batches",
    "usage",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
