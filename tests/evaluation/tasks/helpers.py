"""What the tests of the tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from titans_dist.evaluation.tasks import Text

GOLDEN = Path(__file__).parent / "golden"
ESSAY = Text("A cat  sat down.\n\nIt was warm. Did it sleep? No! It only looked as if.")


class Words:
    """A tokenizer by which tokens can be counted by hand: what white space parts is a token."""

    vocab_size, end_of_document, fingerprint = 2, 1, "words"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.zeros(len(text.split()), np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


BABI = {
    "qa1_single-supporting-fact": """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 John journeyed to the kitchen.
2 Where is John? \tkitchen\t1
""",
    "qa2_two-supporting-facts": """\
1 Mary got the milk there.
2 John moved to the bedroom.
3 Mary travelled to the hallway.
4 Where is the milk? \thallway\t1 3
""",
    "qa3_three-supporting-facts": """\
1 Mary moved to the bathroom.
2 Mary got the football there.
3 Mary journeyed to the office.
4 Where was the football before the office? \tbathroom\t2 3 1
""",
    "qa4_two-arg-relations": """\
1 The hallway is east of the bathroom.
2 The bedroom is west of the bathroom.
3 What is the bathroom east of?\tbedroom\t2
""",
    "qa5_three-arg-relations": """\
1 Fred picked up the football there.
2 Fred gave the football to Jeff.
3 What did Fred give to Jeff? \tfootball\t2
""",
}
"""Files in the form of bAbI's."""


def write_babi(folder: Path) -> Path:
    """A folder with them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in BABI.items():
        (folder / f"{name}_test.txt").write_text(content)
        (folder / f"{name}_train.txt").write_text(content.replace("milk", "apple").replace("Sandra", "Daniel"))
    return folder


def golden(name: str) -> str:
    """A prompt written by hand from the definition, with {} for what is random."""
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")
