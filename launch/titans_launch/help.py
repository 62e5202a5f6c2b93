"""What `--help` prints: static text, so that it is there at once."""

from __future__ import annotations

import difflib

COMMANDS = {
    "quickstart": "prepare, train, kill, resume and evaluate a small model on this machine",
    "prepare": "turn a corpus into a dataset of tokens",
    "train": "train a model, or resume the run of the same name",
    "evaluate": "measure a run's newest checkpoint on the held-out text",
    "conformance": "check that a model, ours or another's, is causal and leaks nothing",
    "parallel-check": "check that a layout computes what one process computes",
    "info": "show versions, devices, the layout and the model's parameters",
}

_TEXTS = {
    "quickstart": """\
titans-dist quickstart [KEY=VALUE ...]

The whole way once, on this machine: prepare the data, train a model of 3M parameters on two processes, kill the job
with SIGKILL half way, start it again, evaluate. `make train` runs it. An earlier runs/quickstart is moved aside to
runs/quickstart.1, never overwritten.

Examples:
  titans-dist quickstart
  titans-dist quickstart parallel=single training.steps=60
  titans-dist quickstart data=stdlib_bytes model.vocab_size=258

Results: runs/<name>/ with metrics.jsonl, checkpoints/, logs/ and reports/heldout.json.""",
    "prepare": """\
titans-dist prepare [KEY=VALUE ...]

Reads a corpus, trains or loads a tokenizer and writes token shards. `train` does it by itself when the dataset is
missing. A finished dataset is left as it is.

Examples:
  titans-dist prepare
  titans-dist prepare data=text data.source=books/ data.vocab_size=8192
  titans-dist prepare data=jsonl data.source=corpus.jsonl data.text_column=content data.path=data/mine
  titans-dist prepare data=parquet data.source=shards/ data.tokenizer=tokenizer.json

Results: the folder data.path, by default data/<format>-<tokenizer>-<vocabulary>/.""",
    "train": """\
titans-dist train [KEY=VALUE ...]

Starts the processes of the layout (tensor x context x pipeline x data) on this machine, or is one of them under
torchrun and srun.
Starting a run of the same name resumes it from its newest checkpoint.

Examples:
  titans-dist train
  titans-dist train name=mine parallel=single training.steps=1000 optimizer.lr=3e-4
  titans-dist train name=other variant=mac memory=yaad
  titans-dist train -m optimizer.lr=1e-3,3e-3 training.steps=200
  torchrun --nproc-per-node 8 -m titans_launch train experiment=titans_340m parallel=tensor8

See all keys and values: titans-dist train --cfg job
Results: runs/<name>/ with config.yaml, metrics.jsonl, checkpoints/ and logs/ (one file per process).
Ctrl-C or SIGTERM saves a checkpoint and exits with 3; a second one ends the job at once.""",
    "evaluate": """\
titans-dist evaluate [KEY=VALUE ...]

Reads the held-out text once with the newest checkpoint of a run: loss, bits per byte, perplexity. Give the same
overrides as to `train`, so that it is the same run.

Examples:
  titans-dist evaluate
  titans-dist evaluate name=mine parallel=single
  titans-dist evaluate name=mine evaluation.max_sequences=64

Results: runs/<name>/reports/heldout.json.""",
    "conformance": """\
titans-dist conformance [KEY=VALUE ...]

Checks five properties of a model: causality (no token changes an output before it), batch independence, gradient flow
(every parameter gets a gradient), split invariance (a sequence in several calls, with the state carried, gives what
one call gives) and recurrence equality (the memory's chunked form gives what its definition gives token by token).

The model is the configuration's, or what the function conformance.target=MODULE:FUNCTION returns: something to call
as model(tokens), tokens (B, T) int64 -> outputs (B, T, ...), the same for the same tokens. Where it also has
initial_state(batch), it is called as model(tokens, state=state) -> (outputs, state) too. Modules are found from the
current folder.

Examples:
  titans-dist conformance variant=mac
  titans-dist conformance -m variant=lmm,mag,gated_deltanet model.num_layers=1
  titans-dist conformance conformance.target=my_package.my_module:make conformance.vocab_size=1000

Results: a table of verdicts; exit code 0 if nothing fails, 1 otherwise (a sweep ends there).""",
    "parallel-check": """\
titans-dist parallel-check [KEY=VALUE ...]

Trains the configured model for three steps on the configured layout, made narrow (heads of 16 dimensions, few blocks),
and then on one process with plain torch, on the same tokens. Compares losses, gradient norms and the gradient of every
parameter, and shows what the processes have sent. Needs no data. A few seconds on each machine before a long run.

Starts the processes on this machine, or is one of them under torchrun and srun, as `train`.

Examples:
  titans-dist parallel-check parallel.tensor=2 parallel.context=2
  titans-dist parallel-check variant=mac parallel.pipeline=2 parallel.tensor=1
  torchrun --nproc-per-node 8 -m titans_launch parallel-check experiment=titans_340m parallel=tensor8

Results: a table with the verdict; exit code 0 if the layout agrees with one process, 1 otherwise.""",
    "info": """\
titans-dist info [KEY=VALUE ...]

Prints versions, devices, what the model is and how large, how many processes a run needs, and every parameter: its
shape, its size and how it is split over tensor-parallel processes. Builds nothing and trains nothing.

Examples:
  titans-dist info
  titans-dist info experiment=titans_340m parallel=tensor8
  titans-dist info -m model=170m,760m variant=mac,gated_deltanet
  titans-dist info variant=lmm memory=moneta""",
}

_EXIT_CODES = """\
Exit codes: 0 done, 2 configuration error (do not retry), 3 interrupted and saved (start again to resume),
  4 data or checkpoint refused, 5 training gave up on unhealthy numbers, 1 anything else."""


def overview() -> str:
    """The text of `titans-dist --help`."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return f"""\
titans-dist COMMAND [KEY=VALUE ...]      pretrain Titans language models

{lines}

Examples:
  titans-dist quickstart
  titans-dist train name=mine variant=mac training.steps=500
  titans-dist train --cfg job                  print the configuration and stop
  titans-dist train --help                     examples of one command
  eval "$(titans-dist -sc install=bash)"       complete commands, keys and values with the Tab key

Configuration is Hydra's: groups (model=340m variant=mac), keys (optimizer.lr=3e-4), sweeps (-m), your own files
(--config-dir). Results lie in runs/<name>/, data in data/.
{_EXIT_CODES}"""


def of(command: str) -> str:
    """The text of `titans-dist COMMAND --help`."""
    return f"{_TEXTS[command]}\n{_EXIT_CODES}"


def unknown_command(word: str) -> str:
    """One sentence for a first word that is no command."""
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    if near:
        return f"unknown command {word}; did you mean {near[0]}?"
    if "=" in word:
        return f"{word} comes before the command; write titans-dist COMMAND {word}, such as titans-dist train {word}"
    return f"unknown command {word}; choose one of {', '.join(COMMANDS)}"
