"""The table of GPUs, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_dist.config import ConfigError
from titans_dist.plan.hardware import gpu, known

OWN = """\
bfloat16: 100.0e+12
float32: 10.0e+12
memory_gb: 48.0
memory_bandwidth: 0.9e+12
link: 32.0e+9
network: 12.5e+9
"""


def test_the_table_has_the_usual_ones() -> None:
    table = known()
    assert list(table) == ["a100", "h100", "h200", "b200", "mi300x"]
    assert all(10 < one.bfloat16 / one.memory_bandwidth / 10 < 50 for one in table.values())  # FLOP per byte
    assert all(one.network < one.link < one.memory_bandwidth for one in table.values())


def test_every_number_has_its_source_beside_it() -> None:
    lines = (Path(known.__code__.co_filename).parent / "hardware.yaml").read_text().splitlines()
    numbers = [line for line in lines if line.startswith("  ") and "name:" not in line]
    assert numbers
    assert all("  # " in line for line in numbers)


def test_names_are_not_case_sensitive() -> None:
    assert gpu("H100") == gpu("h100")


@pytest.mark.parametrize("text", [OWN, "mine:\n" + "".join(f"  {line}\n" for line in OWN.splitlines())])
def test_a_file_describes_a_gpu_of_ones_own(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    found = gpu(str(path))
    assert (found.name, found.memory_bytes, found.peak("bfloat16"), found.peak("float32")) == ("mine", 48e9, 1e14, 1e13)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("link", "lnk"), "has lnk, which no GPU has; use name, bfloat16"),
        (OWN.replace("link: 32.0e+9\n", ""), "lacks link; give name, bfloat16"),
        (OWN.replace("48.0", "-1"), "has memory_gb=-1, which must be a finite number above 0"),
        (OWN.replace("48.0", "much"), "has memory_gb=much, which must be a finite number above 0"),
        ("[1, 2]", "has no table of keys and values"),
        ("a: b: c", "is no YAML file"),
    ],
)
def test_a_bad_file_is_told_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        gpu(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h300", "plan.gpu=h300 is unknown; choose one of a100, h100, h200, b200, mi300x, or the path of a .yaml file"),
        ("none.yaml", "plan.gpu=none.yaml is no file; write one like titans_dist/plan/hardware.yaml"),
    ],
)
def test_an_unknown_gpu_is_told_in_a_sentence(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        gpu(name)
