"""Typed configuration. Imports neither torch nor anything else that is heavy."""

from titans_dist.config.cluster import ClusterConfig, SubmitConfig
from titans_dist.config.errors import CheckpointError, ConfigError, HealthError, Interrupted, UserError
from titans_dist.config.evaluation import EvaluationConfig
from titans_dist.config.model import MemoryConfig, ModelConfig
from titans_dist.config.run import (
    CheckpointConfig,
    Config,
    ConformanceConfig,
    DataConfig,
    HealthConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    TrainingConfig,
)
from titans_dist.config.validate import validate

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "ConformanceConfig",
    "DataConfig",
    "EvaluationConfig",
    "HealthConfig",
    "HealthError",
    "Interrupted",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SubmitConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UserError",
    "validate",
]
