"""Does it stay finite? Training steps of every variant and memory, long sequences, hostile inputs.

    python benchmarks/stability.py [--cases lmm:titans mac:yaad swa tnt] [--depths 1 2 3 4] [--length 16384]
        [--steps 200] [--inputs random constant huge loud] [--dtypes float32 bfloat16] [--hidden 16] [...]

A case is VARIANT or VARIANT:PRESET, or tnt. Without --cases all are tried: every variant, and lmm with every preset;
deep memories at every depth. Each is trained for `--steps` steps on sequences of `--length` tokens, and every loss and
every gradient must be finite. Inputs: random tokens; one token all the time (constant); random tokens with embeddings
1000 times as large (huge), or with the memory's values 1000 times as large (loud). A line is printed as each case ends;
the exit code is 1 if one is not finite.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_dist.config import MemoryConfig, ModelConfig
from titans_dist.config.model import ATTENTION_VARIANTS, RECURRENT_VARIANTS
from titans_dist.config.presets import PRESETS
from titans_dist.layers.neural_memory import NeuralMemory
from titans_dist.model import LanguageModel, build_model
from titans_dist.parallel.culprit import first_output

INPUTS = ("random", "constant", "huge", "loud")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and what it is fed; `preset` and `depth` are None where the variant has no choice of them."""

    variant: str
    preset: str | None
    depth: int | None
    inputs: str
    dtype: str

    @property
    def name(self) -> str:
        depth = "" if self.depth is None else f" depth {self.depth}"
        return f"{self.variant}{'' if self.preset is None else ':' + self.preset}{depth}, {self.dtype}, {self.inputs}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`trouble` is None where all was finite, else a sentence; `gradient`: the largest global norm before clipping."""

    trouble: str | None
    steps: int
    losses: tuple[float, float]
    gradient: float
    seconds: float


def cases(names: list[str], depths: list[int], inputs: list[str], dtypes: list[str]) -> Iterator[Case]:
    """All cases of some models, such as ["lmm:yaad", "swa"]."""
    for name, dtype, kind in itertools.product(names, dtypes, inputs):
        variant, _, preset = name.partition(":")
        if variant in ATTENTION_VARIANTS and kind == "loud":
            continue  # there is no memory whose values could be
        if not preset and variant not in (*ATTENTION_VARIANTS, *RECURRENT_VARIANTS):
            preset = "titans"
        for depth in depths if preset and PRESETS[preset]["depth"] > 1 else [None]:
            yield Case(variant, preset or None, depth, kind, dtype)


def everything() -> list[str]:
    """Names of all models."""
    return [
        *(f"lmm:{preset}" for preset in PRESETS),
        "mac",
        "mag",
        "mal",
        *ATTENTION_VARIANTS,
        *RECURRENT_VARIANTS,
        "tnt",
    ]


def model(case: Case, hidden: int, chunk_size: int) -> LanguageModel:
    """The small model of a case, its weights as the case's inputs want them."""
    memory = MemoryConfig(preset=case.preset, depth=case.depth, chunk_size=chunk_size)
    if case.variant == "tnt":
        memory.global_chunk_size, memory.shard_size = 2048, 2048
    net = build_model(
        ModelConfig(
            variant="lmm" if case.variant == "tnt" else case.variant,
            num_layers=1,
            hidden_size=hidden,
            num_heads=2,
            vocab_size=VOCABULARY,
            window=256,
            segment_length=256,
            persistent_tokens=4,
            memory=memory,
        )
    )
    with torch.no_grad():
        if case.inputs == "huge":
            net.embedding.weight.mul_(1000)
        if case.inputs == "loud":
            for module in net.modules():
                if isinstance(module, NeuralMemory):
                    module.v.weight.mul_(1000)
    return net.to(DTYPES[case.dtype])


def tokens(case: Case, length: int, seed: int) -> Tensor:
    """One sequence (1, length + 1)."""
    if case.inputs == "constant":
        return torch.full((1, length + 1), 7)
    return torch.randint(VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(seed))


def train(net: LanguageModel, case: Case, length: int, steps: int, lr: float, device: str = "cpu") -> Outcome:
    """`steps` steps of AdamW on float32 copies of the weights, gradients clipped to 1: stops at what is not finite."""
    started = time.perf_counter()
    net.to(device)
    copies = [value.detach().float().clone() for value in net.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    first, loss, largest = math.nan, torch.tensor(math.nan), 0.0

    def ended(trouble: str | None, step: int) -> Outcome:
        return Outcome(trouble, step, (first, loss.item()), largest, time.perf_counter() - started)

    for step in range(steps):
        x = tokens(case, length, step).to(device)
        logits = net(x[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        first = loss.item() if step == 0 else first
        if not math.isfinite(loss.item()):
            found = first_output([net], lambda x=x: net(x[:, :-1]))  # type: ignore[misc]
            return ended(
                f"step {step + 1}: loss {loss.item()}, from {found[2] if found else 'the loss itself'}", step + 1
            )
        net.zero_grad()
        loss.backward()
        wild = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if wild:
            return ended(f"step {step + 1}: gradient of {wild[-1]} and {len(wild) - 1} more", step + 1)
        for copy, value in zip(copies, net.parameters(), strict=True):
            copy.grad = torch.zeros_like(copy) if value.grad is None else value.grad.float()
        largest = max(largest, float(torch.nn.utils.clip_grad_norm_(copies, 1.0)))
        optimizer.step()
        with torch.no_grad():
            for copy, value in zip(copies, net.parameters(), strict=True):
                value.copy_(copy)
    return ended(None, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=everything(), metavar="VARIANT[:PRESET]")
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=INPUTS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default in (("length", 16384), ("steps", 200), ("hidden", 16), ("chunk-size", 64), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from timing import show

    rows, troubles = [], 0
    for case in cases(args.cases, args.depths, args.inputs, args.dtypes):
        net = model(case, args.hidden, args.chunk_size)
        outcome = train(net, case, args.length, args.steps, args.lr, args.device)
        troubles += outcome.trouble is not None
        rows.append(
            [
                case.name,
                outcome.trouble or "finite",
                f"{outcome.steps}",
                f"{outcome.losses[0]:.3f} -> {outcome.losses[1]:.3f}",
                f"{outcome.gradient:.1e}",
                f"{outcome.seconds:.1f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    columns = ["", "verdict", "steps", "loss", "largest gradient", "s"]
    show(f"Stability: T {args.length}, hidden {args.hidden}, chunk {args.chunk_size}, {args.device}", columns, rows)
    sys.exit(int(troubles > 0))


if __name__ == "__main__":
    main()
