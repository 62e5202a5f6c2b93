"""The export itself: a committed checkpoint becomes a folder, all of it or none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from titans_dist.checkpoint.store import Store
from titans_dist.checkpoint.tensors import Tensors
from titans_dist.config import CheckpointError, Config, ConfigError, DataConfig, ModelConfig
from titans_dist.config.sizes import parameter_count
from titans_dist.export.card import card
from titans_dist.export.code import source_files
from titans_dist.export.tokenizer import run_tokenizer, write_tokenizer
from titans_dist.export.weights import write_weights
from titans_dist.run.identity import check_model

SUMS = "SHA256SUMS"
CONFIG = "config.json"
MODEL_TYPE = "titans"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    parameters: int
    dtype: str
    files: int
    size_bytes: int
    tokenizer: str
    """What it is, or "none" and why."""


def export(config: Config, step: int) -> Exported:
    """Write the run's checkpoint of `step`, whose files have been verified, in the form that `transformers` loads.

    The model is what the checkpoint says it is; of one that does not say, that of `config`. Raises ConfigError where
    the folder exists, CheckpointError where the checkpoint is not one of such a model.
    """
    store = Store(Path(config.run_dir) / "checkpoints")
    meta = store.meta(step)
    folder = Path(config.export.path or Path(config.run_dir) / "export" / f"hf-{step}").absolute()
    if folder.exists():
        raise ConfigError(f"export.path={folder} exists; remove it, or give another folder")
    model, data = _model(meta, config), _data(meta, config)
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        tensors, limit = Tensors(store.folder(step)), max(1, int(config.export.shard_gb * 1e9))
        dtype = str(write_weights(temporary, tensors, model, limit)).removeprefix("torch.")
        tokenizer, reason = run_tokenizer(data, meta.get("data"))
        kind = f"none: {reason}"
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer)
            kind = f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.fingerprint[:12]}"
        end = data.end_of_document if tokenizer is None else tokenizer.end_of_document
        _write_json(temporary / CONFIG, _config(model, dtype, end))
        _write_json(temporary / "generation_config.json", {} if end is None else _ends(end))
        for name, text in source_files().items():
            (temporary / name).write_text(text, encoding="utf-8")
        text = card(Path(config.run_dir).name, folder.name, model, meta, step, dtype, kind)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        files = sorted(path for path in temporary.iterdir())
        size_bytes = sum(path.stat().st_size for path in files)
        (temporary / SUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files))
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Exported(folder, step, parameter_count(model), dtype, len(files) + 1, size_bytes, kind)


def check_sums(folder: Path) -> None:
    """Compare the files with SHA256SUMS, where there is one. Raises CheckpointError naming the first that differs."""
    path = folder / SUMS
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, but {SUMS} has it; export it again")
        if _sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is damaged or was changed: it does not have the checksum in {SUMS}; export it again, "
                f"or remove {SUMS} if the change is yours"
            )


def _model(meta: dict[str, Any], config: Config) -> ModelConfig:
    if "config" not in meta:
        check_model(meta["identity"], config)
        return config.model
    return ModelConfig(**meta["config"]["model"])


def _data(meta: dict[str, Any], config: Config) -> DataConfig:
    if "config" not in meta:
        return config.data
    known = {field.name for field in dataclasses.fields(DataConfig)}
    return DataConfig(**{key: value for key, value in meta["config"]["data"].items() if key in known})


def _config(model: ModelConfig, dtype: str, end_of_document: int | None) -> dict[str, Any]:
    fields = dataclasses.asdict(model) | {"intermediate_size": model.mlp_size}
    del fields["parameters"]
    fields["memory"]["backend"] = "torch"
    return {
        "architectures": ["TitansForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_titans.TitansConfig",
            "AutoModelForCausalLM": "modeling_titans.TitansForCausalLM",
        },
        "model_type": MODEL_TYPE,
        **fields,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
    }


def _ends(end_of_document: int) -> dict[str, Any]:
    return {"eos_token_id": end_of_document, "pad_token_id": end_of_document}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
