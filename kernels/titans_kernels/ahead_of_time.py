"""Compiles the kernels for a GPU that need not be there, and says what each takes of it.

`python -m titans_kernels.ahead_of_time` prints the table of all kernels, with `--json` a list for programs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

MODULES = (
    "titans_kernels.short_conv",
    "titans_kernels.norm_gate",
    "titans_kernels.tune",
    "titans_kernels.write_resident",
    "titans_kernels.write_backward_resident",
)


@dataclass(frozen=True)
class Configuration:
    """A kernel with all that its machine code depends on; a module's `configurations()` yields those it launches.

    signature: the type of each argument that is no constant, "*bf16" or "i32"; divisible: integers known to be
    multiples of 16, as pointers always are; most_spilled: bytes that it is known to spill, and may.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 1
    divisible: frozenset[str] = frozenset()
    most_spilled: int = 0


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers of a thread; bytes a thread spills and has on its stack (`local`); bytes of
    shared memory of a block; tensor core instructions in the program text, and whether ptxas had to serialize them.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    wgmma: int
    mma_sync: int
    local: int
    serialized: bool


def compile_ahead(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
    num_stages: int = 1,
    arch: int = 90,
    divisible: frozenset[str] = frozenset(),
) -> Usage:
    """Compiles a `@triton.jit` or `@gluon.jit` kernel for compute capability `arch`; no GPU is needed."""
    names = kernel.arg_names
    if unknown := sorted(set(names) ^ (set(signature) | set(constants))):
        raise ValueError(f"{kernel.fn.__name__}: {unknown} must be arguments and have a type or a constant each")
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{type(kernel).__name__} cannot be compiled: the process began with TRITON_INTERPRET set; "
            "unset it, or call compile_in_subprocess()"
        )
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in divisible]
    source = _source_class(kernel)(
        kernel, types, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, log = compiled.asm["ptx"], _assembler_log(compiled.asm["ptx"], arch)

    def found(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, log)]

    return Usage(
        registers=max(found(r"Used (\d+) registers")),
        spill_stores=sum(found(r"(\d+) bytes spill stores")),
        spill_loads=sum(found(r"(\d+) bytes spill loads")),
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        local=max(found(r"(\d+) bytes stack frame")),
        serialized="wgmma.mma_async instructions are serialized" in log,
    )


def configurations() -> Iterator[Configuration]:
    """Those of all kernels."""
    for module in MODULES:
        yield from importlib.import_module(module).configurations()


def compile_in_subprocess() -> dict[str, Usage]:
    """The usage of every configuration, by name, also from a process that interprets its kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "titans_kernels.ahead_of_time", "--json"]
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: Usage(**usage) for name, usage in json.loads(output).items()}


def table(usages: dict[str, Usage]) -> str:
    """A line per kernel."""
    columns = [field.name for field in dataclasses.fields(Usage)]
    width = max(map(len, usages))
    lines = [" ".join(["kernel".ljust(width), *columns])]
    for name, usage in usages.items():
        lines.append(" ".join([name.ljust(width), *(str(getattr(usage, c)).rjust(len(c)) for c in columns)]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print an object of name: usage")
    arguments = parser.parse_args()
    names = [c.name for c in configurations()]
    assert len(set(names)) == len(names), "two configurations have one name"
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        usages = dict(zip(names, processes.map(_usage_of, range(len(names))), strict=True))
    if arguments.json:
        print(json.dumps({name: dataclasses.asdict(usage) for name, usage in usages.items()}))
    else:
        print(table(usages))


def _usage_of(index: int) -> Usage:
    """The usage of one of `configurations()`, whose kernels cannot be sent to another process."""
    c = next(itertools.islice(configurations(), index, None))
    return compile_ahead(c.kernel, c.signature, c.constants, c.num_warps, c.num_stages, divisible=c.divisible)


def _source_class(kernel: triton.JITFunction) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource  # private: only what needs it depends on it

    return GluonASTSource


def _assembler_log(ptx: str, arch: int) -> str:
    """What Triton's ptxas says of a program. Triton calls it alike, but keeps its words to itself."""
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", "-o", str(source.with_suffix(".cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas ended with {done.returncode}: {done.stderr}")
    return done.stderr


if __name__ == "__main__":
    main()
