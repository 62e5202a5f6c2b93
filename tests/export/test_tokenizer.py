"""The tokenizer of an export is the one the tokens are of, as `AutoTokenizer` has it in a clean environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.export import clean, exports, load_tokenizers
from tests.model.models import MODELS
from titans_data import prepare
from titans_data.card import PrepareOptions
from titans_data.tokenize import load_tokenizer

TEXTS = [
    "The memory of a gate decays.\n\n  when\tsurprise is small",
    "Zürich, naïve, 東京, \N{PILE OF POO}, \x00\x7f\xad",
    " a  b   c\r\n",
    "def f(x):\n    return x<|endofdocument|>\n",
    "<|endofdocument|>",
]


def dataset(folder: Path, tokenizer: str) -> Path:
    (folder / "text").mkdir(parents=True)
    for number in range(30):
        (folder / "text" / f"{number}.txt").write_text(" ".join(TEXTS[:3]) * (1 + number % 3) + str(number))
    options = PrepareOptions("text", str(folder / "text"), tokenizer=tokenizer, vocab_size=300, validation_fraction=0.2)
    prepare(options, folder / "data")
    return folder / "data"


def test_ids_and_texts_are_those_of_the_dataset_s_tokenizer(tmp_path: Path) -> None:
    """Also of bytes, which the library has no tokenizer for, and of text that spells a special token."""
    folders, wanted = [], []
    for kind in ("bytes", "bpe"):
        data = dataset(tmp_path / kind, kind)
        _, done = exports.exported(tmp_path / f"{kind}-run", MODELS["lmm"], format="text", path=str(data))
        folders.append(done.folder)
        tokenizer = load_tokenizer(data / "tokenizer")
        ids = [row.tolist() for row in tokenizer.encode_batch(TEXTS)]
        wanted.append({"ids": ids, "back": TEXTS, "end": tokenizer.end_of_document, "size": tokenizer.vocab_size})
        for name in ("config.json", "generation_config.json"):
            assert json.loads((done.folder / name).read_text())["eos_token_id"] == tokenizer.end_of_document
    (tmp_path / "texts").write_text(json.dumps(TEXTS))
    python = clean.linked(tmp_path / "clean")
    script = Path(load_tokenizers.__file__)
    printed = clean.run(python, script, str(tmp_path / "texts"), *map(str, folders), home=tmp_path)
    assert json.loads(printed.splitlines()[-1]) == wanted


def test_a_mixture_has_the_tokenizer_of_its_sources(tmp_path: Path) -> None:
    data = dataset(tmp_path, "bytes")
    _, done = exports.exported(
        tmp_path / "run", MODELS["lmm"], format="mixture", sources={"gone": str(tmp_path / "gone"), "there": str(data)}
    )
    assert done.tokenizer.startswith("257 tokens, sha256 ") and (done.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("what", ["gone", "another"])
def test_without_the_tokenizer_the_export_says_so(what: str, tmp_path: Path) -> None:
    """A tokenizer that the tokens are not of would be worse than none."""
    data = dataset(tmp_path, "bytes")
    if what == "gone":
        data = tmp_path / "nowhere"
    run = exports.config(tmp_path / "run", MODELS["lmm"], format="text", path=str(data))
    state = {"sources": [{"name": "main", "tokenizer": "0" * 64}]}
    exports.checkpoint(run, exports.random_model(MODELS["lmm"]), data=state)
    done = exports.export(run, exports.STEP)
    reason = f"{data}" if what == "gone" else f"that of {data} is not the one the run was trained with"
    assert done.tokenizer.startswith("none: ") and reason in done.tokenizer
    assert not list(done.folder.glob("tokenizer*"))
    assert f"| tokenizer | {done.tokenizer} |" in (done.folder / "README.md").read_text()
