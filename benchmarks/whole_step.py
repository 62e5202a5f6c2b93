"""Whole training steps of small language models beside titans-pytorch's: forward, loss, backward, AdamW.

Same vocabulary, width, heads, blocks, width of the MLP, segments, persistent tokens, and depth, expansion and chunk of
the memory; tokens drawn at random. Of titans-pytorch's options those that make it fast: no hyper-connections, and on
GPUs its accelerated scan where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any, TypeVar

import torch
from timing import Call, Rival
from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.model import LanguageModel, build_model

PACKAGE = "titans_pytorch"
PERSISTENT_TOKENS = 4
Model = TypeVar("Model", bound=nn.Module)


def alone(args: argparse.Namespace) -> dict[str, Rival]:
    """Blocks of a memory and an MLP; only the memory differs."""
    return {
        "titans_dist lmm": (
            None,
            lambda: step(ours(args, "lmm"), args),
            "every token's write, per-token reads, momentum and decay per token",
        ),
        "titans_dist lmm, backend=compiled": (
            None,
            lambda: step(ours(args, "lmm", "compiled"), args),
            "the same",
        ),
        "titans-pytorch's memory, exact mode": (
            PACKAGE,
            lambda: step(with_their_memory(args, exact=True), args),
            "the paper's chunks; momentum and decay per chunk, reads per chunk; no convolutions, no output gate",
        ),
        "titans-pytorch's memory, as it comes": (
            PACKAGE,
            lambda: step(with_their_memory(args, exact=False), args),
            "all gradients at the memory before the sequence: not the recurrence",
        ),
    }


def as_context(args: argparse.Namespace) -> dict[str, Rival]:
    """Each project's own MAC."""
    return {
        "titans_dist mac": (
            None,
            lambda: step(ours(args, "mac"), args),
            "attention over what the memory held and the segment, then every token's write and its read",
        ),
        "titans_dist mac, backend=compiled": (
            None,
            lambda: step(ours(args, "mac", "compiled"), args),
            "the same",
        ),
        "titans-pytorch MAC, exact mode": (
            PACKAGE,
            lambda: step(their_mac(args, exact=True), args),
            "memory before attention, which sees the segment alone; momentum, decay and reads per chunk",
        ),
        "titans-pytorch MAC, as it comes": (
            PACKAGE,
            lambda: step(their_mac(args, exact=False), args),
            "the same, all gradients at the memory before the sequence: not the recurrence",
        ),
    }


def ours(args: argparse.Namespace, variant: str, backend: str = "torch") -> LanguageModel:
    """This project's model."""
    memory = MemoryConfig(depth=args.depth, expansion=args.expansion, chunk_size=args.chunk_size, backend=backend)
    hidden = args.heads * args.head_dim
    model = build_model(
        ModelConfig(
            variant=variant,
            num_layers=args.layers,
            hidden_size=hidden,
            num_heads=args.heads,
            intermediate_size=int(hidden * 4 * 2 / 3),  # as titans-pytorch has it
            vocab_size=args.vocabulary,
            segment_length=args.segment,
            persistent_tokens=PERSISTENT_TOKENS if variant == "mac" else 0,
            tie_embeddings=False,
            memory=memory,
        )
    )
    model.set_recompute("selective" if args.recompute else "none")
    return model


def with_their_memory(args: argparse.Namespace, exact: bool) -> LanguageModel:
    """This project's model around titans-pytorch's memory."""
    from titans_pytorch import NeuralMemory

    model = ours(args, "lmm")
    for block in model.blocks:
        memory = NeuralMemory(
            dim=args.heads * args.head_dim,
            chunk_size=args.chunk_size,
            batch_size=args.chunk_size if exact else None,
            model=their_network(args),
            pre_rmsnorm=False,  # the block has one
            **their_options(args),
        )
        block.mixer = TheirMixer(memory)
    return own_parameters(model)


class TheirMixer(nn.Module):
    """titans-pytorch's memory, called as a block calls its mixer."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor, state: None, starts: None) -> tuple[Tensor, None]:
        """(B, T, hidden) -> the same shape."""
        return self.memory(x)[0], None


def their_mac(args: argparse.Namespace, exact: bool) -> nn.Module:
    """titans-pytorch's MemoryAsContextTransformer."""
    from titans_pytorch import MemoryAsContextTransformer

    model = MemoryAsContextTransformer(
        num_tokens=args.vocabulary,
        dim=args.heads * args.head_dim,
        depth=args.layers,
        heads=args.heads,
        dim_head=args.head_dim,
        segment_len=args.segment,
        num_persist_mem_tokens=PERSISTENT_TOKENS,
        num_residual_streams=1,
        use_flex_attn=args.device == "cuda",
        neural_memory_segment_len=args.chunk_size,
        neural_memory_batch_size=args.chunk_size if exact else None,
        neural_memory_model=their_network(args),
        neural_memory_kwargs=their_options(args),
    )
    return own_parameters(model)


def their_network(args: argparse.Namespace) -> nn.Module:
    """titans-pytorch's memory MLP, of the sizes of ours."""
    from titans_pytorch import MemoryMLP

    return MemoryMLP(dim=args.head_dim, depth=args.depth, expansion_factor=float(args.expansion))


def their_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of titans-pytorch's NeuralMemory: its heads, and what makes it fast."""
    fast = args.device == "cuda" and importlib.util.find_spec("accelerated_scan") is not None
    return {"heads": args.heads, "dim_head": args.head_dim, "use_accelerated_scan": fast}


def own_parameters(model: Model) -> Model:
    """The same module, whose parameters are no views: with several heads titans-pytorch's cannot be trained else."""
    for part in model.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and not value.is_contiguous():
                part._parameters[name] = nn.Parameter(value.detach().clone().contiguous())
    return model


def step(model: nn.Module, args: argparse.Namespace) -> Call:
    """One training step on tokens (B, T) that stay the same."""
    model = model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.vocabulary, (args.batch, args.length + 1), generator=g).to(args.device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()

    def call() -> None:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return call
