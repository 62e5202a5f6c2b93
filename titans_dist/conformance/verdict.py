"""What came out of checking one property."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A property, whether the target has it (None: the target offers no way to tell), and the number that shows it."""

    name: str
    passed: bool | None
    evidence: str

    @property
    def word(self) -> str:
        """pass, FAIL or not offered."""
        return {True: "pass", False: "FAIL", None: "not offered"}[self.passed]
