"""The model's own source files as files of one folder that need torch, transformers and safetensors alone.

`transformers` copies code from a folder file by file and imports it as a package without folders, and from the files
that config.json names it follows relative imports one step far. So `titans_dist/memory/spec.py` becomes
`memory_spec.py`, imports of the package become relative ones of the file that really has the name, and the two files
that config.json names say which files there are. Nothing else of a source changes.

The Triton kernels stay where they are. They are looked for when they are called, which `backend: torch` in config.json
never does.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import titans_dist

PACKAGE = "titans_dist"
KERNELS = "titans_kernels"
ENTRIES = ("titans_dist.export.configuration_titans", "titans_dist.export.modeling_titans")
_ROOT = Path(titans_dist.__file__).parent


def source_files() -> dict[str, str]:
    """File name -> text of every file that the two of ENTRIES need, themselves included."""
    files = {}
    for module in _needed(ENTRIES):
        text = rewritten(module)
        if module in ENTRIES:
            text = _naming(text, [file_name(other) for other in _needed((module,)) if other != module])
        files[f"{file_name(module)}.py"] = text
    return files


def file_name(module: str) -> str:
    """The module's name in the folder.

    >>> file_name("titans_dist.memory.spec"), file_name("titans_dist.export.modeling_titans")
    ('memory_spec', 'modeling_titans')
    """
    return module.rsplit(".", 1)[1] if module in ENTRIES else "_".join(module.split(".")[1:])


def rewritten(module: str) -> str:
    """The source of a module with its imports of the package rewritten; all other lines are as they were."""
    lines = _path(module).read_text(encoding="utf-8").splitlines()
    for node in sorted(_imports(module), key=lambda node: -node.lineno):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [(indent + line).rstrip() for line in _replacement(node)]
    origin = f"# {PACKAGE}/{_path(module).relative_to(_ROOT).as_posix()} of titans-dist {titans_dist.__version__}"
    return "\n".join([origin, *lines]) + "\n"


@dataclass(frozen=True)
class _Home:
    """Where a name that is imported really is: a module, and the name in it (None: it is the module itself)."""

    module: str
    name: str | None


def _needed(modules: tuple[str, ...]) -> list[str]:
    """The modules and all that they import of the package, sorted."""
    found, left = set(modules), list(modules)
    while left:
        for node in _imports(left.pop()):
            new = {home.module for home in _homes(node).values()} - found
            found |= new
            left += sorted(new)
    return sorted(found)


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _path(module: str) -> Path:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imports(module: str) -> Iterator[ast.ImportFrom]:
    """Imports of the package and of the kernels, wherever they stand in the module."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in (PACKAGE, KERNELS):
            yield node


def _replacement(node: ast.ImportFrom) -> list[str]:
    assert node.module is not None
    if node.module.split(".")[0] == KERNELS:  # by a call: an import would be one that transformers asks for
        values = [f'{alias.asname or alias.name} = import_module("{node.module}").{alias.name}' for alias in node.names]
        return ["from importlib import import_module", "", *values]
    lines = []
    for alias, home in zip(node.names, _homes(node).values(), strict=True):
        bound = alias.asname or alias.name
        origin = f".{file_name(home.module)}" if home.name else "."
        name = home.name or file_name(home.module)
        lines.append(f"from {origin} import {name}" + (f" as {bound}" if bound != name else ""))
    return lines


def _homes(node: ast.ImportFrom) -> dict[str, _Home]:
    """Imported name -> where it is; nothing for the kernels."""
    if node.module is None or node.module.split(".")[0] == KERNELS:
        return {}
    return {alias.name: _home(node.module, alias.name) for alias in node.names}


def _home(module: str, name: str) -> _Home:
    """Follow a name that a module has from another one of the package."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _home(node.module, alias.name)
    is_module = _path(module).name == "__init__.py" and _path(f"{module}.{name}").is_file()
    return _Home(f"{module}.{name}", None) if is_module else _Home(module, name)


def _naming(text: str, names: list[str]) -> str:
    """The text with a block at its end that names the files of the folder, for `transformers` to copy them."""
    block = ["", "", "if TYPE_CHECKING:  # never run: transformers copies the files that are named here"]
    block += [f"    from .{name} import __doc__ as {name}_" for name in names]
    return text.replace("from typing import ", "from typing import TYPE_CHECKING, ", 1) + "\n".join(block) + "\n"
