"""A whole task of the harness as one piece of work: asked context by context, then scored by the harness itself."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
from collections.abc import Sequence
from typing import Any

from titans_data.tokenize import Tokenizer
from titans_dist.config.evaluation import HARNESS
from titans_dist.evaluation.harness.tasks import load_task, score_name
from titans_dist.evaluation.work import Piece
from titans_dist.parallel.reader import Reader

RESAMPLED = 1000
"""Draws for a standard error that has no formula, such as a perplexity's."""


class Questions(Sequence[list[Any]]):
    """The requests of a task, those together that share a document and a context."""

    def __init__(self, piece: Piece, folder: str | None, reader: Reader, tokenizer: Tokenizer) -> None:
        """The first `piece.count` documents, or all where there are fewer. Raises what `load_task` raises."""
        from titans_dist.evaluation.harness.model import ReaderLM

        self.piece, self.name = piece, piece.task.removeprefix(HARNESS)
        self.task = load_task(piece.task, folder, piece.seed)
        self.model = ReaderLM(reader, tokenizer)
        with _quiet():
            self.task.build_all_requests(limit=piece.count)
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for request in self.task.instances:
            groups.setdefault((request.request_type, request.doc_id, request.args[0]), []).append(request)
        self._groups = list(groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: Any) -> Any:
        return self._groups[number]

    def answer(self, number: int) -> tuple[list[Any], int]:
        """The model's answers to the requests of a group, and the tokens it has read and written for them."""
        before, group = self.model.tokens, self._groups[number]
        answers = getattr(self.model, group[0].request_type)(group)
        return answers, self.model.tokens - before

    def outcome(self, answers: Sequence[list[Any]]) -> tuple[list[float], str, dict[str, Any]]:
        """Out of the answers to all groups: the score of each document, a digest of the documents, and details.

        Scores are shares of what is right, or for texts as a whole losses in nats per token.
        """
        from lm_eval.evaluator import evaluate

        from titans_dist.evaluation.harness.model import Known

        known = Known(
            (request for group in self._groups for request in group),
            (answer for group in answers for answer in group),
        )
        self.task.set_fewshot_seed(self.piece.seed)  # it makes its requests again, which are to be the same
        with _quiet():
            found = evaluate(
                known,
                {"tasks": {self.name: self.task}},
                limit=self.piece.count,
                bootstrap_iters=RESAMPLED,
                log_samples=True,
            )
        samples = found["samples"][self.name]
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        digest = hashlib.sha256()
        for sample in samples:
            digest.update("".join(sample[f"{part}_hash"] for part in ("doc", "prompt", "target")).encode())
        metric = score_name(self.name, self.task)
        scores = self._losses(samples) if metric is None else [float(sample[metric]) for sample in samples]
        detail = {
            "harness": importlib.metadata.version("lm_eval"),
            "task_version": found["versions"][self.name],
            "dataset": [self.task.DATASET_PATH, self.task.DATASET_NAME],
            "documents": len(samples),
            "of": found["n-samples"][self.name]["original"],
            "shots": found["n-shot"][self.name],
            "score": "loss" if metric is None else metric,
            "metrics": _metrics(found["results"][self.name], found["higher_is_better"][self.name]),
        }
        return scores, digest.hexdigest(), detail

    def _losses(self, samples: list[dict[str, Any]]) -> list[float]:
        """Of each document that has a token."""
        found = []
        for sample in samples:
            (text,), ((likelihood,),) = sample["arguments"][0], sample["resps"]
            tokens = len(self.model.encode(text))
            found += [-likelihood / tokens] if tokens else []
        return found


def _metrics(results: dict[str, Any], higher_is_better: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The harness's "acc,none" and "acc_stderr,none" as acc: value, stderr or None, higher_is_better."""
    found = {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results.get(f"{metric}_stderr,{filtered}")
        found[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": None if stderr in (None, "N/A") else float(stderr),
            "higher_is_better": higher_is_better.get(metric),
        }
    return found


@contextlib.contextmanager
def _quiet() -> Any:
    """Without progress bars, and without the processes that the harness would fork out of one that may use a GPU."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
