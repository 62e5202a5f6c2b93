"""The stages of a mixture of datasets: what can be, and at which step each begins."""

from __future__ import annotations

from titans_dist.config.checks import at_least, between
from titans_dist.config.errors import ConfigError
from titans_dist.config.run import Config, StageConfig

MAX_WEIGHT = 1e12


def validate_mixture(config: Config) -> None:
    """Raise ConfigError for sources or stages that cannot be."""
    data = config.data
    if data.format != "mixture":
        if data.sources or data.stages:
            key = "sources" if data.sources else "stages"
            raise ConfigError(f"data.{key} is for data=mixture and data.format={data.format}; use data=mixture")
        return
    if not data.sources:
        raise ConfigError("data=mixture has no datasets; add +data.sources.NAME=FOLDER for each")
    for number, stage in enumerate(data.stages):
        _stage(f"data.stages[{number}]", stage, list(data.sources))
        before = data.stages[number - 1] if number else None
        if before is None:
            if stage.from_tokens:
                raise ConfigError(
                    f"data.stages[0].from_tokens={stage.from_tokens} leaves the tokens before it without a mixture; "
                    "use 0"
                )
        elif before.tokens and stage.from_tokens is not None:
            raise ConfigError(
                f"data.stages[{number}].from_tokens={stage.from_tokens} and the stage before ends with its tokens; "
                "leave from_tokens out"
            )
        elif not before.tokens and stage.from_tokens is None:
            raise ConfigError(
                f"data.stages[{number}] does not say where it begins; add from_tokens, the tokens of the run before it"
            )
    steps = stage_steps(config)
    for number in range(1, len(steps)):
        if steps[number] <= steps[number - 1]:
            raise ConfigError(
                f"data.stages[{number}] begins at step {steps[number]} and the stage before it at step "
                f"{steps[number - 1]}; give each stage at least one step of {_step_tokens(config):,} tokens"
            )
    if data.stages and data.stages[-1].tokens:
        end = steps[-1] + _steps_of(data.stages[-1], config)
        if config.training.steps > end:
            raise ConfigError(
                f"training.steps={config.training.steps} goes on after the tokens of the last stage, which end with "
                f"step {end}; use training.steps={end} or add a stage"
            )


def stage_steps(config: Config) -> list[int]:
    """The step at which each stage begins: after `from_tokens`, or after the tokens of the stage before."""
    steps: list[int] = []
    for number, stage in enumerate(config.data.stages):
        if number == 0:
            steps.append(0)
        elif stage.from_tokens is not None:
            steps.append(-(-stage.from_tokens // _step_tokens(config)))
        else:
            steps.append(steps[-1] + _steps_of(config.data.stages[number - 1], config))
    return steps


def rows_of(tokens: int, config: Config) -> int:
    """Rows that hold `tokens` tokens, the last one perhaps not all."""
    return -(-tokens // config.data.sequence_length)


def _stage(key: str, stage: StageConfig, sources: list[str]) -> None:
    if bool(stage.weights) == bool(stage.tokens):
        what = "both weights and tokens" if stage.weights else "neither weights nor tokens"
        raise ConfigError(f"{key} has {what}; give one of them, such as weights:{{{sources[0]}:1}}")
    for name in (*stage.weights, *stage.tokens):
        if name not in sources:
            raise ConfigError(f"{key} names {name}, which is no source; choose among {', '.join(sources)}")
    for name, weight in stage.weights.items():
        between(f"{key}.weights.{name}", weight, 0, MAX_WEIGHT)
    for name, tokens in stage.tokens.items():
        at_least(f"{key}.tokens.{name}", tokens, 1)
    if stage.weights and not any(stage.weights.values()):
        raise ConfigError(f"{key}.weights are all 0; give one source more")


def _steps_of(stage: StageConfig, config: Config) -> int:
    rows = sum(rows_of(tokens, config) for tokens in stage.tokens.values())
    return -(-rows // config.training.global_batch_size)


def _step_tokens(config: Config) -> int:
    return config.training.global_batch_size * config.data.sequence_length
