"""An export is loaded where there is torch, transformers and safetensors and nothing of ours, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.export import clean, exports, load_exports
from tests.model.models import MODELS, tokens
from titans_dist.model import LanguageModel, generate

SCRIPT = Path(load_exports.__file__)
CASES = [*MODELS, "bfloat16"]
"""bfloat16: the model mag as a bfloat16 run has it."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean.linked(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LanguageModel, Path]]:
    """Every model, and the folder it was exported to."""
    found = {}
    for name in CASES:
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model, done = exports.exported(tmp_path_factory.mktemp("runs") / name, MODELS.get(name, MODELS["mag"]), dtype)
        found[name] = model, done.folder
    return found


@pytest.fixture(scope="module")
def results(
    python: Path, models: dict[str, tuple[LanguageModel, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What the exports compute in the clean environment."""
    folder = tmp_path_factory.mktemp("results")
    return loaded(python, folder, [path for _, path in models.values()])


def loaded(python: Path, folder: Path, paths: list[Path]) -> dict[str, Tensor]:
    save_file({"tokens": tokens()}, folder / "tokens")
    clean.run(python, SCRIPT, str(folder / "tokens"), str(folder / "results"), *map(str, paths), home=folder)
    return load_file(folder / "results")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_are_those_of_our_model(
    name: str, models: dict[str, tuple[LanguageModel, Path]], results: dict[str, Tensor]
) -> None:
    model = models[name][0]
    with torch.no_grad():
        wanted = model(tokens())
    assert results[f"{name}.logits"].dtype == wanted.dtype
    torch.testing.assert_close(results[f"{name}.logits"], wanted, rtol=0, atol=1e-5)
    loss = F.cross_entropy(wanted[:, :-1].float().flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(results[f"{name}.loss"], loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generate_continues_as_ours_does_with_and_without_the_cache(
    name: str, models: dict[str, tuple[LanguageModel, Path]], results: dict[str, Tensor]
) -> None:
    wanted = generate(models[name][0], tokens()[:, : load_exports.PREFIX], load_exports.NEW, temperature=0)
    assert torch.equal(results[f"{name}.cached"], wanted)
    assert torch.equal(results[f"{name}.uncached"], wanted)
    assert torch.equal(results[f"{name}.cached_beams"], results[f"{name}.uncached_beams"])


def test_beam_search_has_reordered_its_caches(results: dict[str, Tensor]) -> None:
    """It is no test of the cache where every beam search ends as the greedy one."""
    assert any(not torch.equal(results[f"{name}.cached_beams"], results[f"{name}.cached"]) for name in MODELS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_environment_that_pip_has_made_loads_them_too(
    models: dict[str, tuple[LanguageModel, Path]], tmp_path: Path
) -> None:
    """Nothing of this environment is in it; as a user would do it, with the versions of constraints.txt."""
    (tmp_path / "home").mkdir()
    names = ("mag", "mac", "lmm_tnt")
    found = loaded(clean.installed(tmp_path / "clean"), tmp_path / "home", [models[name][1] for name in names])
    for name in names:
        with torch.no_grad():
            torch.testing.assert_close(found[f"{name}.logits"], models[name][0](tokens()), rtol=0, atol=1e-5)
