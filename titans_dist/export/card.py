"""README.md of an export: what the model is, in facts, and how it is loaded."""

from __future__ import annotations

from typing import Any

import titans_dist
from titans_dist.config import ModelConfig
from titans_dist.config.sizes import parameter_count

_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- titans
- custom_code
---

# {name}

A {kind} language model with {parameters:,} parameters, pretrained with titans-dist {version} and exported at step
{step:,} of its training.

| | |
|---|---|
{rows}

## How to load it

It needs torch, transformers and safetensors. The code of the model lies in this folder, so `trust_remote_code=True` is
needed; read it first. `dtype="auto"` keeps the weights in {dtype}.

```python
{load}
```

Without `return_dict_in_generate` and beams, `generate` costs the same for each token however long the text: the cache
is the model's own state. Texts of a batch must be of one length, or be filled up on the right for a call without a
cache: what stands on the left of a text would be written into the memory.

The Triton kernels that training uses on GPUs are not part of this folder; `memory["backend"]` is `torch`.
`sha256sum -c SHA256SUMS` checks the files.
"""

_LOAD_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
tokens = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=40, do_sample=True, temperature=0.8)[0]))"""

_LOAD_TOKENS = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True, dtype="auto")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=40))  # no tokenizer came with the run"""


def card(
    name: str, folder: str, model: ModelConfig, meta: dict[str, Any], step: int, dtype: str, tokenizer: str
) -> str:
    """The text of README.md; meta: what the checkpoint says. tokenizer: what it is, or why there is none."""
    memory = _memory(model) if model.has_memory else "none"
    config, tokens, loss = meta.get("config") or {}, meta.get("tokens"), meta.get("loss")
    facts = [
        ("variant", model.variant),
        ("memory", memory),
        ("blocks", f"{model.num_layers} of width {model.hidden_size:,}, MLP {model.mlp_size:,}"),
        ("heads", f"{model.num_heads} of {model.head_dim} dimensions" + _kv(model)),
        ("vocabulary", f"{model.vocab_size:,}, embeddings {'tied' if model.tie_embeddings else 'not tied'}"),
        ("tokenizer", tokenizer),
        ("weights", dtype),
        ("tokens seen", "unknown" if tokens is None else f"{tokens:,}"),
        ("length of a training sequence", f"{config['data']['sequence_length']:,}" if config else "unknown"),
        ("last training loss", "unknown" if loss is None else f"{loss:.4f} nats per token"),
    ]
    has_tokenizer = not tokenizer.startswith("none")
    return _TEXT.format(
        name=name,
        kind=model.variant.upper() if model.has_memory else model.variant,
        parameters=parameter_count(model),
        version=titans_dist.__version__,
        step=step,
        rows="\n".join(f"| {key} | {value} |" for key, value in facts),
        dtype=dtype,
        load=(_LOAD_TEXT if has_tokenizer else _LOAD_TOKENS).format(folder=folder),
    )


def _kv(model: ModelConfig) -> str:
    return "" if model.kv_heads == model.num_heads else f", {model.kv_heads} of keys and values"


def _memory(model: ModelConfig) -> str:
    memory = model.memory
    tnt = f", TNT with chunks of {memory.global_chunk_size} and shards of {memory.shard_size}" if memory.is_tnt else ""
    return f"{memory.preset}, depth {memory.choice('depth')}, chunks of {memory.chunk_size}{tnt}"
