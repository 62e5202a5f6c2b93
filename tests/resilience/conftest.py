"""The corpus and the names of runs of tests.training."""

from tests.training.conftest import home, name

__all__ = ["home", "name"]
