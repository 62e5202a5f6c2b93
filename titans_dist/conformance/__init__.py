"""Properties that every causal sequence model must have, checked on any model: ours, or somebody else's.

from titans_dist.conformance import check
for verdict in check(model, vocab_size=64):
    print(verdict.name, verdict.word, verdict.evidence)
"""

from titans_dist.conformance.kit import check
from titans_dist.conformance.verdict import Verdict

__all__ = ["Verdict", "check"]
