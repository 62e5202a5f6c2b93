"""Typed configuration. Imports neither torch nor anything else that is heavy."""

from titans_dist.config.errors import CheckpointError, ConfigError, HealthError, Interrupted, UserError
from titans_dist.config.model import MemoryConfig, ModelConfig
from titans_dist.config.run import (
    ClusterConfig,
    Config,
    ConformanceConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    TrainingConfig,
)
from titans_dist.config.validate import validate

__all__ = [
    "CheckpointError",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "ConformanceConfig",
    "DataConfig",
    "EvaluationConfig",
    "HealthError",
    "Interrupted",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UserError",
    "validate",
]
