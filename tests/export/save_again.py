"""Runs in a clean environment: `save_again.py FOLDER NEW` loads an export, changes a weight and saves it in NEW."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM


def main(folder: str, new: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(new, max_shard_size="10KB")
    again = AutoModelForCausalLM.from_pretrained(new, trust_remote_code=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


if __name__ == "__main__":
    main(*sys.argv[1:])
