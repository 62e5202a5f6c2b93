"""An environment with torch, transformers, safetensors and what they require, and with nothing else.

`linked` makes it from what is installed here, by links, in a second; `installed` by pip, as a user does. In both
`titans_dist`, `megatron` and `triton` (where torch does not require it) cannot be imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
WANTED = ("torch", "transformers", "safetensors")
ABSENT = ("titans_dist", "titans_kernels", "titans_data", "megatron", "deepspeed", "streaming", "einops", "torchvision")


def linked(folder: Path) -> Path:
    """The Python of an environment that shares files with this one."""
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in required(WANTED):
        found = metadata.distribution(name)
        # What lies beside the packages (scripts, headers) is not imported.
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            target = packages / top
            if not target.exists() and top != "__pycache__":
                target.symlink_to(Path(str(found.locate_file(top))))
    return folder / "bin" / "python"


def installed(folder: Path) -> Path:
    """The Python of an environment that pip has filled."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run(["./install-torch", python], cwd=ROOT, check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    subprocess.run([*pip, "transformers", "safetensors"], cwd=ROOT, check=True)
    return Path(python)


def required(names: tuple[str, ...]) -> set[str]:
    """The distributions and all that they require on this machine."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(text) for text in metadata.distribution(name).requires or []]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def run(python: Path, script: Path, *arguments: str, home: Path) -> str:
    """What a script prints in the environment; transformers keeps copies of code below `home`."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(home)}
    found = subprocess.run(
        [str(python), "-I", str(script), *arguments],
        env=kept | offline,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout
