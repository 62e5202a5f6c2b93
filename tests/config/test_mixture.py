"""Sources and stages of a mixture: what is refused, with the mend, and where each stage begins."""

from __future__ import annotations

import pytest

from titans_dist.config import Config, ConfigError, DataConfig, validate
from titans_dist.config.mixture import stage_steps
from titans_dist.config.run import StageConfig

STEP = 16 * 256
"""Tokens of a step of the default batch and length."""


def mixture(*stages: StageConfig, steps: int = 100, **changes: object) -> Config:
    data = DataConfig(
        format="mixture", path="", sources={"web": "data/web", "code": "s3://bucket/code"}, stages=list(stages)
    )
    for key, value in changes.items():
        setattr(data, key, value)
    config = Config(name="demo", run_dir="runs/demo", data=data)
    config.training.steps = steps
    return config


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        validate(config)
    return str(error.value)


WEB = {"web": 1.0}
BOTH = {"web": 0.7, "code": 0.3}


@pytest.mark.parametrize(
    ("stages", "steps"),
    [
        ([], []),
        ([StageConfig(weights=BOTH)], [0]),
        ([StageConfig(from_tokens=0, weights=BOTH), StageConfig(from_tokens=10 * STEP, weights=WEB)], [0, 10]),
        ([StageConfig(weights=BOTH), StageConfig(from_tokens=10 * STEP + 1, weights=WEB)], [0, 11]),
        ([StageConfig(tokens={"web": 3 * STEP, "code": STEP}), StageConfig(weights=WEB)], [0, 4]),
        ([StageConfig(tokens={"web": STEP + 1}), StageConfig(weights=WEB)], [0, 2]),
        (
            [
                StageConfig(weights=WEB),
                StageConfig(from_tokens=5 * STEP, tokens={"code": STEP}),
                StageConfig(None, WEB),
            ],
            [0, 5, 6],
        ),
    ],
)
def test_a_stage_begins_with_the_first_step_after_its_tokens(stages: list[StageConfig], steps: list[int]) -> None:
    config = mixture(*stages)
    validate(config)
    assert stage_steps(config) == steps


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([StageConfig()], "data.stages[0] has neither weights nor tokens; give one of them, such as weights:{web:1}"),
        ([StageConfig(weights=WEB, tokens={"web": 5})], "data.stages[0] has both weights and tokens"),
        ([StageConfig(weights={"wbe": 1.0})], "data.stages[0] names wbe, which is no source; choose among web, code"),
        ([StageConfig(tokens={"x": 1})], "data.stages[0] names x, which is no source"),
        (
            [StageConfig(weights={"web": -1.0})],
            "data.stages[0].weights.web=-1.0 is out of range; use 0 to 1000000000000.0",
        ),
        ([StageConfig(tokens={"web": 0})], "data.stages[0].tokens.web=0 is too small; use 1 or more"),
        ([StageConfig(weights={"web": 0.0})], "data.stages[0].weights are all 0; give one source more"),
        ([StageConfig(from_tokens=5, weights=WEB)], "data.stages[0].from_tokens=5 leaves the tokens before it"),
        ([StageConfig(weights=WEB)] * 2, "data.stages[1] does not say where it begins; add from_tokens"),
        (
            [StageConfig(tokens={"web": STEP}), StageConfig(from_tokens=STEP, weights=WEB)],
            f"data.stages[1].from_tokens={STEP} and the stage before ends with its tokens; leave from_tokens out",
        ),
        (
            [StageConfig(weights=WEB), StageConfig(from_tokens=STEP, weights=BOTH), StageConfig(STEP, WEB)],
            f"data.stages[2] begins at step 1 and the stage before it at step 1; give each stage at least one step of "
            f"{STEP:,} tokens",
        ),
        (
            [StageConfig(tokens={"web": 99 * STEP})],
            "training.steps=100 goes on after the tokens of the last stage, which end with step 99; use "
            "training.steps=99 or add a stage",
        ),
    ],
)
def test_impossible_stages_are_refused_with_the_mend(stages: list[StageConfig], words: str) -> None:
    assert words in refusal(mixture(*stages))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_is_a_finite_number(weight: float) -> None:
    assert "data.stages[0].weights.web" in refusal(mixture(StageConfig(weights={"web": weight})))


def test_a_mixture_needs_sources_and_nothing_else_takes_them() -> None:
    assert "data=mixture has no datasets; add +data.sources.NAME=FOLDER" in refusal(mixture(sources={}))
    assert "data.sources is for data=mixture and data.format=mds" in refusal(mixture(format="mds", path="x"))
    only_stages = mixture(StageConfig(weights=WEB), format="mds", path="x", sources={})
    assert "data.stages is for data=mixture" in refusal(only_stages)
