"""What `--help` prints: static text, so that it is there at once."""

from __future__ import annotations

import difflib

COMMANDS = {
    "quickstart": "prepare, train, kill, resume and evaluate a small model on this machine",
    "prepare": "turn a corpus into a dataset of tokens",
    "data ls": "list datasets: counts, tokenizer, share of the mixture",
    "data show": "print the text that a rank reads at a step",
    "data verify": "check every file of the datasets against its checksum",
    "data stats": "count tokens and documents, with a plot",
    "data plan": "list the samples of steps, and what is drawn of each dataset",
    "plan": "say whether a run fits, how long it takes and what to change, without a GPU",
    "train": "train a model, or resume the run of the same name",
    "resume": "train on from a run's newest checkpoint, or say what that would be",
    "evaluate": "measure a run's newest checkpoint on the held-out text, or on the tasks of a suite",
    "evaluate ls": "list what was measured of a run",
    "evaluate report": "write the report of what was measured anew",
    "submit": "hand a job to Slurm, to Kubernetes or to the background of this machine",
    "status": "what the scheduler says of a submitted run, and what the run says itself",
    "logs": "print what the job of a submitted run has printed",
    "cancel": "end the job of a submitted run; training saves first",
    "requeue": "let the job of a submitted run save and begin again",
    "checkpoint ls": "list the checkpoints of a run",
    "checkpoint verify": "check every file of the checkpoints against its checksum",
    "checkpoint diff": "compare two checkpoints, tensor by tensor",
    "checkpoint prune": "remove the checkpoints that need not be kept",
    "checkpoint convert": "to DeepSpeed's universal checkpoint, and back",
    "checkpoint export": "write a checkpoint as a folder that Hugging Face transformers loads",
    "checkpoint import": "begin a run with the weights of such a folder",
    "conformance": "check that a model, ours or another's, is causal and leaks nothing",
    "parallel-check": "check that a layout computes what one process computes",
    "doctor": "examine the machines of a job before it begins, and name those to leave out",
    "drill": "train while faults come, and compare with a run that nothing disturbed",
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
    "data ls": """\
titans-dist data ls [KEY=VALUE ...]

Lists the configuration's datasets and those below data/: documents, tokens, bytes and shards of each split, the
tokenizer, what was dropped, the fingerprint and, in a mixture, the share in each stage.

Examples:
  titans-dist data ls
  titans-dist data ls data=mds data.path=s3://bucket/corpus
  titans-dist data ls data=mixture +data.sources.web=data/web +data.sources.code=data/code

Results: a table for each dataset.""",
    "data show": """\
titans-dist data show [KEY=VALUE ...]

Prints what a data-parallel rank reads at a step: dataset, epoch, row and place of each sequence, where documents begin
in it, and its text. Give the same overrides as to `train`; a run that has a checkpoint is shown as it went and as it
will go on. Steps and epochs are counted from 1, everything else from 0.

Examples:
  titans-dist data show
  titans-dist data show inspect.step=120 inspect.rank=3 inspect.ranks=8
  titans-dist data show name=mine inspect.step=50 inspect.sequences=4

Results: a table and the text of each sequence; token ids where there is no tokenizer.""",
    "data verify": """\
titans-dist data verify [KEY=VALUE ...]

Reads every file of the configuration's datasets and compares it with the sha256 on the dataset's card; those of remote
datasets go through the cache. Goes on after a bad file and names all of them.

Examples:
  titans-dist data verify
  titans-dist data verify data=mds data.path=data/books
  titans-dist data verify data=mixture +data.sources.web=data/web +data.sources.code=s3://bucket/code

Results: a table with the number of files and the speed; exit code 4 if a file is bad.""",
    "data stats": """\
titans-dist data stats [KEY=VALUE ...]

Counts what the training split of each dataset is made of: length of documents, bytes per token, the most frequent
tokens, how much of the vocabulary is used, entropy. Reads inspect.max_tokens tokens in evenly spread stretches; a
document counts where it begins in one, and is then followed to its end.

Examples:
  titans-dist data stats
  titans-dist data stats data=mds data.path=data/books inspect.max_tokens=null
  titans-dist data stats data=tokens data.path=train.bin data.end_of_document=0

Results: tables, and reports/data-<dataset>.json and .png (with matplotlib) in runs/<name>/.""",
    "data plan": """\
titans-dist data plan [KEY=VALUE ...]

Lists the samples of the steps inspect.step to inspect.to_step: which rank reads them, from which dataset, epoch, row
and token. Then how much of each dataset is drawn, repeated and left unused, up to there and by the end of the run. Give
the same overrides as to `train`; a run that has a checkpoint is shown as it went and as it will go on. Steps and epochs
are counted from 1, everything else from 0.

Examples:
  titans-dist data plan inspect.step=1 inspect.to_step=2
  titans-dist data plan inspect.to_step=200 inspect.output=samples.csv
  titans-dist data plan name=mine inspect.step=51 inspect.ranks=8

Results: tables of samples (of many the first), stages and use; inspect.output=FILE.csv gets every sample.""",
    "plan": """\
titans-dist plan [--json] [--verify] [--search N] [--gpu NAME] [--picture FILE] [KEY=VALUE ...]

Works out, from the configuration alone and within seconds: what each GPU holds, by pipeline stage; operations per
token; what is sent, over which links; how long a step and the run take, as a range with what is assumed. What does not
fit is told with the nearest layout of as many GPUs that does. --search lists the fastest layouts of N GPUs. --verify
runs the real model of a stage's process on tensors without numbers, and puts what it had and sent beside the plan.

GPUs: a100, h100, h200, b200, mi300x, or a .yaml file like titans_dist/plan/hardware.yaml. How many: those of cluster,
or as many as the layout has processes.

Examples:
  titans-dist plan experiment=titans_760m cluster=h100_4x8
  titans-dist plan experiment=titans_1b3 cluster=h100_4x8 data.sequence_length=1048576 parallel.context=32 --json
  titans-dist plan experiment=titans_760m --search 64 --gpu h200
  titans-dist plan experiment=titans_340m --picture memory.png --verify

Results: tables, or with --json all numbers; exit code 0 if it fits, 1 if not, or if --verify finds the plan off.""",
    "train": """\
titans-dist train [KEY=VALUE ...]

Starts the processes of the layout (tensor x context x pipeline x data) on this machine, or is one of them under
torchrun and srun.
Starting a run of the same name resumes it from its newest checkpoint. After a process has died all are started again
from there, cluster.max_restarts times at most.

Examples:
  titans-dist train
  titans-dist train name=mine parallel=single training.steps=1000 optimizer.lr=3e-4
  titans-dist train name=other variant=mac memory=yaad
  titans-dist train -m optimizer.lr=1e-3,3e-3 training.steps=200
  torchrun --nproc-per-node 8 -m titans_launch train experiment=titans_340m parallel=tensor8

See all keys and values: titans-dist train --cfg job
Results: runs/<name>/ with config.yaml, metrics.jsonl, checkpoints/ and logs/ (one file per process).
Ctrl-C or SIGTERM saves a checkpoint and exits with 3; a second one ends the job at once.""",
    "resume": """\
titans-dist resume [--explain] [KEY=VALUE ...]

Trains as `train` does, but refuses, with exit code 4, where the run has no checkpoint. Give the same overrides as to
`train`.

With --explain nothing is started: prints which checkpoint would be used and which are passed over, everything that is
not as it was when it was saved (processes, layout, engine, data, keys, versions) and whether it reshards, counts from
the next step on or is refused, and the samples of the next step. Exit code 0 if the start would go on, else that with
which it would refuse.

Examples:
  titans-dist resume name=mine
  titans-dist resume --explain name=mine
  titans-dist resume --explain name=mine parallel.tensor=1 parallel.data=4

Results: as of `train`, in runs/<name>/; with --explain tables alone.""",
    "checkpoint ls": """\
titans-dist checkpoint ls [KEY=VALUE ...]

Lists the checkpoints of a run: step, time, size, tokens seen, loss, and the processes, layout and engine that saved
it. Which are committed, which of them stay for ever, which is the newest; and what saves that did not end have left.

Examples:
  titans-dist checkpoint ls
  titans-dist checkpoint ls name=mine

Results: a table.""",
    "checkpoint verify": """\
titans-dist checkpoint verify [--step N] [KEY=VALUE ...]

Reads every file of a run's checkpoints, or of the one of step N, and compares it with the sha256 in the manifest. Goes
on after a bad file and names all of them.

Examples:
  titans-dist checkpoint verify name=mine
  titans-dist checkpoint verify name=mine --step 400

Results: a table for each checkpoint; exit code 4 if a file is bad.""",
    "checkpoint diff": """\
titans-dist checkpoint diff [--step N] [--to-step N] [--path RUN_FOLDER] [KEY=VALUE ...]

Compares two checkpoints of a run, by default its two newest, or one of the run with one of another run, by default
their newest. Per tensor: the largest difference, and the norm of the difference as a share of the first one's norm.
Then what the checkpoints say of themselves: configuration, data, layout, versions. One tensor of each is in memory at
a time, and no process group is needed.

Examples:
  titans-dist checkpoint diff name=mine
  titans-dist checkpoint diff name=mine --step 100 --to-step 400
  titans-dist checkpoint diff name=mine --step 400 --path runs/other

Results: tables of what differs, and how many tensors are equal.""",
    "checkpoint prune": """\
titans-dist checkpoint prune [--dry-run] [KEY=VALUE ...]

Removes the checkpoints of a run but the checkpoint.keep newest, those that are permanent and the newest one that is
whole, as training does by itself after each save. Refused while the run is trained. With --dry-run nothing is removed.

Examples:
  titans-dist checkpoint prune --dry-run name=mine
  titans-dist checkpoint prune name=mine checkpoint.keep=2

Results: a table of what stays, and why, and what is removed.""",
    "checkpoint convert": """\
titans-dist checkpoint convert [--format deepspeed] [--step N] [--path FOLDER] [--read] [KEY=VALUE ...]

Writes the checkpoint of step N, by default the newest, as a universal checkpoint of DeepSpeed: float32 weights, Adam's
moments and step. Its job loads it with "checkpoint": {"load_universal": true} at any ZeRO stage from 1 to 3; its own
optimizer settings count, and order and state of the data and a carried state do not go along.

With --read it is the other way round: FOLDER is a universal checkpoint that DeepSpeed's own converter,
`python -m deepspeed.checkpoint.ds_to_universal`, has made of a ZeRO-1, 2 or 3 checkpoint of the configured model, and
becomes a checkpoint of the run, which then goes on with the data of step N + 1.

Upstream's gap: what that converter makes of ZeRO-1 or 2, DeepSpeed 0.19.8 cannot load with ZeRO-3. Through a run of
ours it can: --read it, then write it again. And after a load ZeRO-3 gives all its groups one counter of steps, which
each raises; with Adam of torch add: for s in optimizer.state.values(): s["step"] = s["step"].clone(). Checkpoints of
ours are the same for every engine and stage, so training.zero_stage may change at any start.

One tensor is in memory at a time, and DeepSpeed need not be installed.

Examples:
  titans-dist checkpoint convert name=mine
  titans-dist checkpoint convert name=mine --step 400 --path /tmp/universal
  titans-dist checkpoint convert --read name=back --path /tmp/universal

Results: FOLDER, by default runs/<name>/export/deepspeed-<step>/, with latest_universal; with --read a checkpoint.""",
    "checkpoint export": """\
titans-dist checkpoint export [--step N] [--path FOLDER] [--format hf] [KEY=VALUE ...]

Writes the newest valid checkpoint of a run, or the one of step N, as a folder that
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads where there is only torch, transformers and
safetensors: weights, configuration, tokenizer, model card and the code of the model. Every file of the checkpoint is
verified first. One file of weights, of at most export.shard_gb, is in memory at a time.

Examples:
  titans-dist checkpoint export name=mine
  titans-dist checkpoint export name=mine --step 400 --path exported/mine
  titans-dist checkpoint export name=mine export.shard_gb=2

Results: the folder, by default runs/<name>/export/hf-<step>.""",
    "checkpoint import": """\
titans-dist checkpoint import --path FOLDER [KEY=VALUE ...]

Makes an exported folder, or what `save_pretrained` has made of it, the checkpoint of step 0 of a new run: its weights,
and an optimizer that has not made a step. Give the overrides that `train` is to have, the model's among them: they must
be the export's, and those that differ are named. `train` and `evaluate` with the same name then go on from there.

Works in one process; under torchrun each process of the layout reads its part.

Examples:
  titans-dist checkpoint import --path exported/mine name=tuned optimizer.lr=1e-4
  titans-dist checkpoint import --path exported/mac name=tuned variant=mac
  torchrun --nproc-per-node 8 -m titans_launch checkpoint import --path exported/mine name=tuned parallel.tensor=8

Results: the checkpoint in runs/<name>/checkpoints/.""",
    "evaluate": """\
titans-dist evaluate [--follow RUN] [KEY=VALUE ...]

Reads the held-out text once with the newest checkpoint of a run: loss, bits per byte, perplexity. Give the same
overrides as to `train`, so that it is the same run. With a suite (offline, positions, ruler, babilong, commonsense),
measures its tasks by Ray workers instead: what is in the run's ledger is not measured again, and a report is written.

--follow measures every checkpoint of a run while it is trained; the run's own configuration is read from its folder.
It ends when the run is done, keeps to a share of the time (evaluation.follow.budget), and goes on where it was.

Examples:
  titans-dist evaluate
  titans-dist evaluate name=mine parallel=single evaluation.max_sequences=64
  titans-dist evaluate name=mine suite=ruler evaluation.samples=100 evaluation.workers=2
  titans-dist evaluate --follow mine suite=offline +evaluation.follow.every.positions=4

Results: in runs/<name>/, reports/heldout.json; of a suite reports/evaluation.html; of --follow evaluation.jsonl.""",
    "evaluate ls": """\
titans-dist evaluate ls [KEY=VALUE ...]

Lists what was measured of a run, by checkpoint, task and length of the context: score, 95% interval, number and seeds
of the samples. Measures nothing. evaluation.tasks, evaluation.lengths, evaluation.step or a suite restrict the list.

Examples:
  titans-dist evaluate ls name=mine
  titans-dist evaluate ls name=mine suite=ruler
  titans-dist evaluate ls name=mine 'evaluation.tasks=[passkey]' 'evaluation.lengths=[2048]'

Results: a table.""",
    "evaluate report": """\
titans-dist evaluate report [KEY=VALUE ...]

Writes the report of all that was measured of a run, without measuring: accuracy by length and depth, loss by position,
curves over training, beside the runs that evaluation.control names and the papers' rows, which are marked as theirs.
It opens without a network. A suite writes it at its end as well.

Examples:
  titans-dist evaluate report name=mine
  titans-dist evaluate report name=mine 'evaluation.control=[swa,other]'
  titans-dist evaluate report name=mine evaluation.step=400

Results: evaluation.html, evaluation.csv and PNG files in runs/<name>/reports/.""",
    "submit": """\
titans-dist submit [--dry-run] [--command COMMAND] [--chain N] [KEY=VALUE ...]

Writes what the scheduler gets, a copy of the source code and the whole configuration to runs/<name>/submit/, and hands
the job in: to Slurm (cluster=slurm), to Kubernetes (cluster=k8s) or to the background of this machine. Nothing needs to
be edited. With --dry-run both are printed and nothing is handed in.

The job is a start of the run of that name: it goes on from the newest checkpoint. Before a time limit or preemption it
saves and is requeued; a configuration error is not tried again.

Examples:
  titans-dist submit name=mine training.steps=200
  titans-dist submit experiment=titans_340m cluster=slurm_h100 cluster.nodes=2 --dry-run
  titans-dist submit experiment=titans_760m cluster=k8s_h100 --dry-run
  titans-dist submit name=sweep cluster=slurm 'submit.array=["training.seed=1","training.seed=2"]'

Results: files in runs/<name>/submit/ and the name of the job; logs in runs/<name>/logs/.""",
    "status": """\
titans-dist status NAME

Shows the job of the run NAME as its scheduler sees it, and the last step of the run.

Examples:
  titans-dist status mine
  titans-dist status name=mine

Results: a table.""",
    "logs": """\
titans-dist logs [--follow] NAME

Prints what the job of the run NAME has printed: of all its starts, that of the first process. With --follow until the
job is over.

Examples:
  titans-dist logs mine
  titans-dist logs --follow mine

Results: text.""",
    "cancel": """\
titans-dist cancel NAME

Ends the job of the run NAME for good. Training saves first; the same `submit` goes on from there.

Examples:
  titans-dist cancel mine
  titans-dist cancel name=mine

Results: a line.""",
    "requeue": """\
titans-dist requeue NAME

Lets the job of the run NAME save, end and begin again as soon as there is room.

Examples:
  titans-dist requeue mine
  titans-dist requeue name=mine

Results: a line.""",
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
    "doctor": """\
titans-dist doctor [KEY=VALUE ...]

The preflight before a long run: some seconds on all its machines. Each process looks at the versions it runs, at room
in the run folder and in /dev/shm and at what comes back from a file there, at its GPU, and at the time and the bits of
a matrix product that are the same on all. Together they compare clocks, send to each other round a ring, and add up
over all. A machine that differs from most others, is slow, damaged or does not answer within cluster.timeout_s is bad.

Starts the processes of the layout on this machine, or is one of them under torchrun and srun, as `train`.

Examples:
  titans-dist doctor
  titans-dist submit name=mine cluster=slurm_h100 cluster.timeout_s=60 --command doctor
  srun --ntasks-per-node 8 titans-dist doctor name=mine cluster.timeout_s=60

Results: a table; the bad hosts in runs/<name>/exclude.txt, which `submit` to Slurm leaves out; what each process has
found in runs/<name>/doctor/. Exit code 0 if all is well, 1 otherwise.""",
    "drill": """\
titans-dist drill [--faults N] [--seed N] [--hours H] [KEY=VALUE ...]

The fire drill, before a long run on new machines. Trains a small model twice with the real loop on the configured
layout: once undisturbed, once while faults come at random moments. Ranks are killed, hang, are slow, compute a gradient
that is not a number or find their disk full; the whole job is killed or gets SIGTERM; checkpoints are damaged. On CPU
every loss must be bit for bit that of the undisturbed run, and no step may be lost or out of order.

Examples:
  titans-dist drill
  titans-dist drill --faults 100 --seed 1
  titans-dist drill --hours 8 parallel.tensor=2 parallel.data=2

Results: a line for each fault and a table; exit code 0 if the runs agree, 1 otherwise. Both lie in
runs/<name>/seed-<seed>/.""",
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
    return f"""\
titans-dist COMMAND [KEY=VALUE ...]      pretrain Titans language models

{_listed(COMMANDS)}

Examples:
  titans-dist quickstart
  titans-dist train name=mine variant=mac training.steps=500
  titans-dist train --cfg job                  print the configuration and stop
  titans-dist train --help                     examples of one command
  eval "$(titans-dist -sc install=bash)"       complete commands, keys and values with the Tab key

Configuration is Hydra's: groups (model=340m variant=mac), keys (optimizer.lr=3e-4), sweeps (-m), your own files
(--config-dir). Results lie in runs/<name>/, data in data/.
{_EXIT_CODES}"""


def families() -> list[str]:
    """The first words of commands of two words."""
    return list(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command that a command line begins with, of one word or two, and what follows it."""
    words = 1
    if arguments[0] in families() and len(arguments) > 1 and not arguments[1].startswith("-"):
        # `evaluate name=mine` is a command by itself.
        words = 1 if arguments[0] in COMMANDS and "=" in arguments[1] else 2
    return " ".join(arguments[:words]), arguments[words:]


def of_family(family: str) -> str:
    """The text of `titans-dist FAMILY --help`."""
    own = {name: purpose for name, purpose in COMMANDS.items() if name.startswith(f"{family} ")}
    return f"""\
titans-dist {family} COMMAND [KEY=VALUE ...]

{_listed(own)}

Examples of one command: titans-dist {next(iter(own))} --help
{_EXIT_CODES}"""


def of(command: str) -> str:
    """The text of `titans-dist COMMAND --help`."""
    return f"{_TEXTS[command]}\n{_EXIT_CODES}"


def unknown_command(words: str) -> str:
    """One sentence for a first word, or one of families() and another word, that are no command."""
    family, _, word = words.rpartition(" ")
    choices = [name for name in COMMANDS if name.startswith(f"{family} " if family else "")]
    short = {name.split()[-1]: name for name in reversed(choices)}
    if word in short:  # `show` for `data show`
        near = [short[word]]
    elif family:
        near = [short[close] for close in difflib.get_close_matches(word, short, n=1, cutoff=0.5)]
    else:
        near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if near:
        return f"unknown command {words}; did you mean {near[0]}?"
    if "=" in word:
        family = f"{family} " if family else ""
        return (
            f"{word} comes before the command; write titans-dist {family}COMMAND {word}, such as titans-dist "
            f"{choices[0] if family else 'train'} {word}"
        )
    return f"unknown command {words}; choose one of {', '.join(choices)}"


def _listed(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in commands.items())
