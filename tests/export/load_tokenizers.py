"""Runs in a clean environment: `load_tokenizers.py TEXTS FOLDER...` prints what tokenizers make of texts as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer


def main(texts_path: str, *folders: str) -> None:
    texts = json.loads(Path(texts_path).read_text())
    found = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in texts]
        back = [tokenizer.decode(row) for row in ids]
        found.append({"ids": ids, "back": back, "end": tokenizer.eos_token_id, "size": len(tokenizer)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
