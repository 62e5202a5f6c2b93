"""The package as a whole: what importing it costs and what an error looks like."""

from __future__ import annotations

import subprocess
import sys

import pytest

import titans_data
from titans_data import DataError


def test_importing_the_package_loads_no_heavy_library(environment: dict[str, str]) -> None:
    code = """
import sys
import titans_data
from titans_data import DataError, PrepareOptions, load_card
heavy = {"torch", "streaming", "tokenizers", "datasets", "pyarrow", "numpy"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", titans_data.__all__)
def test_every_public_name_resolves_to_what_it_names(name: str) -> None:
    value = getattr(titans_data, name)
    # A submodule of the same name would come back as a module once it has been imported.
    assert value.__name__ == name


def test_preparing_does_not_hide_the_prepare_function(prepared: object) -> None:
    assert callable(titans_data.prepare)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = titans_data.nonsense


def test_data_errors_carry_exit_code_four() -> None:
    assert DataError.exit_code == 4
    assert DataError("x").exit_code == 4
