"""What a run is: its data, layout, optimizer, training, tracking and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from titans_dist.config.cluster import ClusterConfig, SubmitConfig
from titans_dist.config.evaluation import EvaluationConfig
from titans_dist.config.model import ModelConfig


@dataclass
class ParallelConfig:
    """How the model and the batch are split over processes."""

    tensor: int = 1
    """Processes that share every layer (tensor parallel), >= 1; divides heads, MLP width and vocabulary."""
    sequence: bool = True
    """Whether norms and residuals are split along the sequence between tensor-parallel processes."""
    pipeline: int = 1
    """Stages, one after the other, into which the blocks are divided (pipeline parallel), >= 1."""
    virtual: int = 1
    """Parts of the model that every stage holds (interleaved), >= 1; more make the pipeline's bubble smaller."""
    layers: list[int] | None = None
    """Blocks of each of the pipeline x virtual parts, in the order of the model. Unset: as even as can be."""
    context: int = 1
    """Processes that share every sequence (context parallel), >= 1; each holds as many tokens."""
    context_mode: str = "auto"
    """How the memory crosses from one share of a sequence to the next: heads (whole sequences of some heads), ring
    (the state is handed on), scan (affine memories alone) or auto: heads where they divide, else ring."""
    context_groups: int | None = None
    """Groups of sequences and heads that follow each other round the ring, >= 1; more make its bubble smaller and the
    matrix products too. Unset: twice as many as processes, where there are as many sequences and heads."""
    data: int | None = None
    """Copies of the model that share the batch, >= 1. Unset: as many as the launched processes allow, else 1."""


@dataclass
class StageConfig:
    """What a stage of data=mixture is mixed of: weights or tokens, by the names of data.sources."""

    from_tokens: int | None = None
    """Tokens of the run after which the stage begins. Unset: at once, or when the tokens of the stage before end."""
    weights: dict[str, float] = field(default_factory=dict)
    """Name -> share of the rows, in any unit."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Name -> tokens to draw in this stage, which ends with them."""


@dataclass
class DataConfig:
    """Where the tokens come from."""

    format: str = MISSING
    """What the corpus is: stdlib, text, jsonl, parquet or huggingface; or mds (a prepared dataset), mixture (of
    several), tokens (a flat token file) or synthetic, which need no preparing."""
    source: str | None = None
    """File or folder of the corpus (or hub name for huggingface); not used by stdlib and synthetic."""
    text_column: str = "text"
    """Field or column that holds the text in jsonl, parquet and huggingface corpora."""
    path: str = MISSING
    """Folder of the prepared dataset, of mds also an address such as s3://bucket/folder; for tokens the file itself;
    not used by synthetic and mixture."""
    sources: dict[str, str] = field(default_factory=dict)
    """Name -> folder or address of each prepared dataset of data=mixture."""
    stages: list[StageConfig] = field(default_factory=list)
    """What data=mixture is mixed of, stage after stage. Empty: every source by its size."""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the corpus), bytes, or the path of a Hugging Face tokenizer.json or its folder."""
    vocab_size: int = 4096
    """Vocabulary of a trained tokenizer, or of the ids in a tokens or synthetic source."""
    dtype: str = "uint16"
    """Integer type of a flat token file: uint16 or uint32."""
    end_of_document: int | None = None
    """Token after which a document of a flat token file ends. Unset: the file is one document."""
    sequence_length: int = 256
    """Tokens of one training sequence, >= 2."""
    documents: str = "joined"
    """What documents in one sequence know of each other: nothing (packed), or all that came before (joined)."""
    validation_fraction: float = 0.01
    """Share of the documents (or of a token file's end) held out, 0 < x < 0.5."""
    deduplicate: bool = False
    """Whether prepare keeps only the first of equal documents."""
    min_characters: int | None = None
    """Prepare leaves out documents with fewer characters, >= 1. This and the next four are off when unset."""
    max_characters: int | None = None
    """Prepare leaves out documents with more characters, >= 1."""
    max_compression_ratio: float | None = None
    """Prepare leaves out documents that zlib makes more than so many times smaller, > 0: repetition; try 10."""
    min_compression_ratio: float | None = None
    """Prepare leaves out documents that zlib makes less than so many times smaller, > 0: noise; try 1.2."""
    max_repeated_lines: float | None = None
    """Prepare leaves out documents with a larger share of their text in lines seen before in them, 0 to 1; try 0.3."""
    prepare_workers: int = 0
    """Processes of prepare, >= 0; 0: one per core, fewer for a small corpus. The dataset does not depend on it."""
    synthetic_tokens: int = 1 << 24
    """Length of the synthetic stream, in tokens."""
    workers: int = 0
    """Loader processes per rank, >= 0; 0 reads in the training process."""
    shuffle_shards: int = 16
    """Shards whose rows are shuffled together, >= 1; a remote dataset needs room for as many in the cache."""
    cache: str | None = None
    """Folder of this machine in which downloaded shards are kept; all runs may share it. Unset: in the folder for
    temporary files."""
    cache_gb: float = 64.0
    """Upper bound on the size of that folder in 10^9 bytes, > 0; what was used longest ago makes room."""
    fetch_ahead: int = 32
    """Steps for which the shards of a remote dataset are downloaded beforehand, >= 0."""
    seed: int = 1234
    """Seed of the sample order (and of the synthetic stream)."""


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate, > 0."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end as a share of the peak, 0 to 1."""
    warmup_steps: int = 10
    """Steps of linear warm-up, >= 0; a run of fewer steps ends inside it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors are not decayed. >= 0."""
    beta1: float = 0.9
    """Decay of the first moment, 0 <= x < 1."""
    beta2: float = 0.95
    """Decay of the second moment, 0 <= x < 1."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down. 0 turns it off."""


@dataclass
class TrainingConfig:
    """What one run of the training loop does."""

    steps: int = 100
    """Optimizer steps in all, >= 1."""
    global_batch_size: int = 16
    """Sequences per step over all processes, a multiple of micro_batch_size x data-parallel size."""
    micro_batch_size: int = 16
    """Sequences per forward pass of one model copy, >= 1."""
    carry_state: bool = False
    """Whether sequences go on where those of the step before ended, with memory and attention carried over until the
    document ends (truncated backpropagation): every document is read whole, however long. Needs documents=packed."""
    engine: str = "megatron"
    """What runs the step: megatron (any layout) or deepspeed (ZeRO; no pipeline)."""
    zero_stage: int = 1
    """What engine=deepspeed splits between data-parallel processes: nothing (0), optimizer state (1), also gradients
    (2), also parameters (3). engine=megatron always splits the optimizer state."""
    offload: bool = False
    """Whether engine=deepspeed keeps the optimizer state in the memory of the CPU; needs zero_stage 1 or more."""
    recompute: str = "selective"
    """What the backward pass works out again instead of keeping it: none; the memory's states inside each group of
    chunks (selective), so that the memory a long sequence takes stays small; or whole blocks (full)."""
    precision: str = "float32"
    """Parameters and activations: float32 or bfloat16 (with float32 master weights, gradients and memory state)."""
    device: str = "auto"
    """auto (cuda where there is one), cuda or cpu."""
    seed: int = 1234
    """Seed of the initial weights; the same weights on every layout."""
    log_interval: int = 1
    """Steps between console lines, >= 1. Every step goes to metrics.jsonl."""
    max_minutes: float | None = None
    """Minutes after its start at which the job must have saved and ended, > 0. Unset: the end time that Slurm gives
    the job, else none."""


@dataclass
class CheckpointConfig:
    """When a run is saved, how, and what is kept."""

    interval: int = 50
    """Steps between checkpoints, >= 1; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept, >= 2: one may be damaged."""
    permanent_interval: int | None = None
    """Steps between checkpoints that are kept for ever, >= 1. Unset: none is."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written; it then waits for the copy to memory alone."""
    retries: int = 2
    """How often a save that failed is tried again, >= 0."""
    strict: bool = False
    """Whether a save that failed, retries and all, ends the run. Else it is reported, and the next save may succeed."""
    margin: float = 1.5
    """How many times the longest save so far is kept free before a deadline, >= 1."""
    mirror: str | None = None
    """Address to which every checkpoint is also copied, such as s3://bucket/folder; a start without any checkpoint in
    its run folder goes on from there."""


@dataclass
class HealthConfig:
    """What counts as an unhealthy step, and what is done about it: redo, skip, a lower learning rate, go back, end."""

    redo: bool = True
    """Whether a step that is not finite is computed once more: what is a fault of the machine does not come twice."""
    spike: float = 20.0
    """Robust standard deviations above the median of the last steps at which a loss or gradient norm is a spike, whose
    update is skipped. 0: only what is not finite is skipped."""
    window: int = 128
    """Healthy steps that those statistics look back on, >= 8; they judge nothing before they are that many."""
    skips: int = 3
    """Unhealthy steps among the last `window` that are only skipped, >= 0; the next one lowers the learning rate."""
    lower_lr: float = 0.5
    """Factor by which the learning rate is lowered, 0 < x <= 1."""
    lower_steps: int = 200
    """Steps for which it stays lower, >= 1; an unhealthy step in that time makes the run go back."""
    rollbacks: int = 2
    """How often the run may go back to an earlier checkpoint and leave out the data since then, >= 0. Then it ends."""
    rollback_to: int = 2
    """Which checkpoint it goes back to, >= 1: 1 is the newest, 2 the one before it."""
    memory_spike: float = 50.0
    """Robust standard deviations above its own median at which a memory's weight norm or surprise makes a step
    unhealthy. 0 turns it off."""
    straggler: float = 1.5
    """How many times the median of all ranks' own time a rank must take to be reported as slow, > 1. 0 turns it off."""


@dataclass
class TrackingConfig:
    """Where metrics go beside metrics.jsonl, which is always written and is the truth."""

    wandb: bool = False
    """Whether to log to Weights & Biases as well (WANDB_MODE=offline is honored)."""
    project: str = "titans_dist"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases team or user; unset: the account's default."""
    memory_interval: int = 10
    """Steps between rows on the health of the neural memories, >= 1; 0 writes none."""


@dataclass
class ConformanceConfig:
    """What `titans-dist conformance` checks, and on how many tokens."""

    target: str | None = None
    """MODULE:FUNCTION that is called without arguments and returns the model to check. Unset: the model of model/."""
    vocab_size: int = 64
    """Tokens are drawn from 0 .. vocab_size - 1, >= 2; at most what the model has."""
    length: int = 144
    """Tokens of a sequence, >= 4; should be well beyond the model's chunks, segments and window."""
    batch: int = 2
    """Sequences, >= 2."""
    probes: int = 32
    """How many of the tokens are changed in turn to look for leaks of the future, >= 1."""


@dataclass
class InspectConfig:
    """What the `titans-dist data` and `titans-dist checkpoint` commands look at."""

    step: int | None = None
    """The step to look at, or the first of them, >= 1, as metrics.jsonl counts; also one after training.steps. Unset:
    the first step of the data, the newest checkpoint."""
    to_step: int | None = None
    """The last step of `data plan`, or the other one of `checkpoint diff`, at least inspect.step. Unset: the same step,
    the newest checkpoint."""
    ranks: int | None = None
    """Data-parallel ranks that share the global batch, >= 1. Unset: parallel.data, else 1."""
    rank: int = 0
    """The data-parallel rank of `show`, from 0 to below inspect.ranks."""
    sequences: int = 1
    """Sequences of that rank that `show` prints, >= 1; at most what it gets."""
    max_tokens: int | None = 2_000_000
    """Tokens of each source that `stats` reads, evenly spread, >= 1. null: all."""
    output: str | None = None
    """CSV file for the samples of `plan`. Unset: the first of them as a table."""


@dataclass
class PlanConfig:
    """What `titans-dist plan` assumes of the GPUs, and what it looks for."""

    gpu: str = "h100"
    """a100, h100, h200, b200, mi300x, or a .yaml file like titans_dist/plan/hardware.yaml that describes another."""
    search: int | None = None
    """GPUs, >= 1, whose best layouts are listed. Unset: none are looked for."""
    picture: str | None = None
    """PNG file for a picture of the memory of each pipeline stage; needs matplotlib. Unset: none."""


@dataclass
class ExportConfig:
    """What `titans-dist checkpoint export`, `import` and `convert` make of which folder."""

    format: str = "hf"
    """hf (what `transformers` loads) or deepspeed (its universal checkpoint)."""
    path: str | None = None
    """The folder to write, or of `import` and `convert` the one to read. Unset: export/<format>-<step> in the run."""
    shard_gb: float = 5.0
    """Upper bound on the size of one file of weights in 10^9 bytes, > 0."""


@dataclass
class DrillConfig:
    """The faults of `titans-dist drill`."""

    faults: int = 16
    """How many faults are injected, >= 1."""
    seed: int = 1
    """Seed of which fault comes when, and to which rank."""
    hours: float | None = None
    """Go on with further faults for so long, > 0. Unset: until `faults` of them are over."""


@dataclass
class Config:
    """Everything a command needs; one object for all of them."""

    name: str = MISSING
    """Name of the run; starting the same name again resumes it."""
    run_dir: str = MISSING
    """Folder of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Group model/ (and memory/, which fills model.memory)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Group parallel/."""
    data: DataConfig = field(default_factory=DataConfig)
    """Group data/."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Group optimizer/."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Group training/."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Group tracking/."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Group evaluation/."""
    conformance: ConformanceConfig = field(default_factory=ConformanceConfig)
    """Group conformance/."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Group checkpoint/."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Group health/."""
    inspect: InspectConfig = field(default_factory=InspectConfig)
    """Group inspect/."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Group plan/."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Group export/."""
    drill: DrillConfig = field(default_factory=DrillConfig)
    """Group drill/."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Group cluster/."""
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    """Group submit/."""
