"""Everything about the kernels that only a GPU can tell: one command, a table per subject, one file of results.

    python benchmarks/gpu.py [--quick] [--output FOLDER]

Correctness of the memory's kernels against float64, and whether they repeat bit for bit; the machine's ceilings; the
operator's and the layer's speed and memory beside titans-pytorch's and flash-linear-attention's; each kernel's time
beside the roofline's; whole training steps of 340M models; and which targets are met. Nine minutes at most; with
--quick (correctness of few cases, and speed) three. Writes FOLDER/gpu-<card>-<date>.json after every subject.

Python, torch and triton are enough. What else is missing (titans-pytorch, fla-core, megatron-core) only leaves its rows
empty, and these say so. Exit code 1 if a case fails, 2 without a GPU.
"""

import sys

if __name__ == "__main__":  # this folder last, in child processes too: its operator.py must not stand in for Python's
    sys.path.append(sys.path.pop(0))

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_correctness
import gpu_machine
import gpu_operator
import gpu_step
import torch
from gpu_machine import ROOT, Row, Settings
from timing import show

MINUTES = {"quick": 3.0, "default": 9.0, "tiny": 2.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, few repeats, no kernels and no steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the torch form, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that this program runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: run this on a machine with an NVIDIA GPU, or with --device cpu --tiny.")
        return 2
    if args.device == "cpu" and not args.tiny:
        print("The kernels need a GPU; --device cpu is there to try this program, with --tiny.")
        return 2
    if args.device == "cpu":
        torch.set_num_threads(1)
    minutes = MINUTES["tiny" if args.tiny else "quick" if args.quick else "default"]
    seed = int(time.time())  # fresh numbers for every run; the results say which
    settings = Settings(args.device, args.quick, args.tiny, seed, time.monotonic() + 60 * minutes)
    return run(settings, args.output)


def run(settings: Settings, folder: Path) -> int:
    """All subjects, one after the other."""
    machine = gpu_machine.describe_machine(settings.device)
    results: Row = {"machine": machine, "seed": settings.seed, "quick": settings.quick, "tiny": settings.tiny}
    card, date = machine["card"].replace(" ", "-"), machine["date"][:10]
    path = folder / f"gpu-{card}-{date}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def keep(subject: str, value: Any) -> None:
        results[subject] = value
        path.write_text(json.dumps(results, indent=1) + "\n")

    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    cases = gpu_correctness.correctness(settings)
    keep("correctness", cases)
    show_correctness(cases)
    ceilings = gpu_operator.ceilings(settings)
    keep("ceilings", ceilings)
    rivals = gpu_operator.operators(settings, ceilings["matmul_flops_per_s"])
    keep("operator", rivals)
    show_operators(rivals, ceilings)
    targets = gpu_operator.targets(rivals, settings.backend)
    if not settings.quick:
        kernels = guarded(lambda: gpu_operator.kernels(settings))
        keep("kernels", kernels)
        show_kernels(kernels)
        steps = gpu_step.steps(settings)
        keep("steps", steps)
        show_steps(steps)
        targets += gpu_step.targets(steps)
    keep("targets", targets)
    rows = [[row["target"], f"{row['least']:g}", number(row["value"], 1, 2), row["met"]] for row in targets]
    show_table("Targets", ["", "at least", "measured", ""], rows)
    failed = [row for row in cases if not row.get("passed")]
    print(f"{len(cases) - len(failed)} of {len(cases)} cases pass. Results: {path}")
    return 1 if failed else 0


def guarded(subject: Callable[[], list[Row]]) -> list[Row]:
    """Its rows, or one that says why there are none."""
    try:
        return subject()
    except Exception as error:
        return [{"error": gpu_machine.why(error)}]


def show_correctness(cases: list[Row]) -> None:
    """A line per case, all its dtypes on it."""
    rows = []
    for case in dict.fromkeys(row["case"] for row in cases):
        of_case = [row for row in cases if row["case"] == case]
        said = {
            row["dtype"]: f"{row['error']:.1e} {row['worst']}" if "worst" in row else row["error"] for row in of_case
        }
        found = [said.get(dtype, "") for dtype in gpu_correctness.BOUNDS]
        failures = [f"FAIL {row['dtype']}" + ", not the same twice" * ("worst" in row and not row["deterministic"])
                    for row in of_case if not row.get("passed")]  # fmt: skip
        rows.append([case, *found, "; ".join(failures) or "pass"])
    bounds = [f"{dtype}, at most {bound:g}" for dtype, bound in gpu_correctness.BOUNDS.items()]
    show_table("Largest relative error to float64, of all outputs and gradients", ["", *bounds, ""], rows)


def show_operators(rivals: list[Row], ceilings: Row) -> None:
    for sizes in dict.fromkeys(row["sizes"] for row in rivals):
        rows = []
        for row in (row for row in rivals if row["sizes"] == sizes):
            if "error" in row:
                rows.append([row["rival"], row["error"], *[""] * 6])
                continue
            rows.append(
                [
                    row["rival"],
                    number(row["seconds"], 1e-3, 2),
                    number(row["tokens"], 1, 0),
                    number(row["tokens_per_s"], 1e6, 3),
                    number(row.get("flops_per_s"), 1e12, 1),
                    number(row.get("share"), 0.01, 1),
                    number(row["peak_bytes"], 2**30, 2),
                    number(row["bytes_per_token"], 1024, 1),
                ]
            )
        columns = ["forward + backward", "ms, median", "tokens", "M tokens/s", "TFLOP/s", "% of matmul", "peak GiB",
                   "KiB per token"]  # fmt: skip
        show_table(
            f"{sizes}. Here a matrix product runs at {ceilings['matmul_flops_per_s'] / 1e12:,.1f} TFLOP/s, "
            f"a copy at {ceilings['copy_bytes_per_s'] / 1e12:,.2f} TB/s",
            columns,
            rows,
        )


def show_kernels(kernels: list[Row]) -> None:
    rows = []
    for row in kernels:
        if "error" in row:
            rows.append([row["error"], *[""] * 4])
            continue
        model = "" if "model_overlapped" not in row else (
            f"{number(row['model_overlapped'], 1e-3, 2)} to {number(row['model_one_by_one'], 1e-3, 2)}"
        )  # fmt: skip
        times = [number(row["seconds"], 1e-3, 3), number(row["share"], 0.01, 1), model]
        rows.append([row["kernel"][:60], f"{row['launches']}", *times])
    show_table("Kernels of the largest operator above", ["", "launches", "ms", "%", "roofline's model, ms"], rows)


def show_steps(steps: list[Row]) -> None:
    rows = []
    for row in steps:
        if "error" in row:
            rows.append([row["model"], f"{row['length']:,}", row["error"], *[""] * 4])
            continue
        rows.append(
            [
                row["model"],
                f"{row['length']:,}",
                number(row["tokens"], 1, 0),
                number(row["seconds"], 1e-3, 1),
                number(row["tokens_per_s"], 1, 0),
                number(row["peak_bytes"], 2**30, 2),
                number(row["bytes_per_token"], 1024, 1),
            ]
        )
    columns = ["340M model", "context", "tokens a step", "ms, median", "tokens/s", "peak GiB", "KiB per token"]
    show_table("Whole training steps", columns, rows)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    show(title, columns, rows)
    sys.stdout.flush()


def number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # what broke on a GPU may hang Python's own end
