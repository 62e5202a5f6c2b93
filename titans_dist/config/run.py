"""What a run is: its data, layout, optimizer, training, tracking and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

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
class DataConfig:
    """Where the tokens come from."""

    format: str = MISSING
    """What the corpus is: stdlib, text, jsonl, parquet, huggingface, tokens (a flat token file) or synthetic."""
    source: str | None = None
    """File or folder of the corpus (or hub name for huggingface); not used by stdlib and synthetic."""
    text_column: str = "text"
    """Field or column that holds the text in jsonl, parquet and huggingface corpora."""
    path: str = MISSING
    """Folder of the prepared dataset; for tokens the file itself; not used by synthetic."""
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
    synthetic_tokens: int = 1 << 24
    """Length of the synthetic stream, in tokens."""
    workers: int = 0
    """Loader processes per rank, >= 0; 0 reads in the training process."""
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
    checkpoint_interval: int = 50
    """Steps between checkpoints, >= 1; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, >= 2: one may be damaged."""


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
class EvaluationConfig:
    """Held-out evaluation."""

    max_sequences: int | None = None
    """Held-out sequences to read, spread over the text, or with training.carry_state its first. Unset: all, once."""
    micro_batch_size: int = 16
    """Sequences per forward pass of one model copy, >= 1."""


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
class ClusterConfig:
    """The machines and how processes are started on them."""

    timeout_s: int = 600
    """Seconds after which a collective that some process did not join is an error, >= 1."""
    threads: int = 1
    """CPU threads per process, >= 1."""


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
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Group cluster/."""
