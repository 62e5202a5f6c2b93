"""Runs in a clean environment: `load_exports.py TOKENS RESULTS FOLDER...` loads every export and calls it.

TOKENS: safetensors with `tokens` (B, T). RESULTS: safetensors with what each folder's model makes of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

NEW = 12
PREFIX = 10
"""Tokens before those that are generated."""


def main(tokens_path: str, results_path: str, *folders: str) -> None:
    for name in ("titans_dist", "titans_kernels", "megatron", "triton"):
        if importlib.util.find_spec(name) is not None:
            raise SystemExit(f"{name} can be imported: this environment is not clean")
    tokens = load_file(tokens_path)["tokens"]
    results = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        name = Path(folder).parents[1].name
        with torch.no_grad():
            found = model(tokens, labels=tokens)
        results[f"{name}.logits"], results[f"{name}.loss"] = found.logits.clone(), found.loss
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(tokens[:, :PREFIX])  # else every 0 is taken for one that pads
        for use_cache in (True, False):
            key = f"{name}.{'cached' if use_cache else 'uncached'}"
            results[key] = model.generate(tokens[:, :PREFIX], use_cache=use_cache, **options).clone()
            beams = model.generate(tokens[:, :PREFIX], use_cache=use_cache, num_beams=3, **options)
            results[f"{key}_beams"] = beams.clone()
    save_file(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
