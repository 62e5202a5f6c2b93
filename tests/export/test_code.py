"""The code of an export is the package's own, line by line, but for its imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import titans_dist
from titans_dist.export.code import source_files

ROOT = Path(titans_dist.__file__).parent
FILES = source_files()
ENTRIES = ("configuration_titans.py", "modeling_titans.py")


def imports(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def without_imports(text: str) -> str:
    """The program as Python sees it, imports and what is made in their place left out."""

    class Drop(ast.NodeTransformer):
        def visit_Import(self, node: ast.Import) -> None:
            return None

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            return None

        def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
            return None if "import_module(" in ast.unparse(node.value) else node

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return ast.unparse(Drop().visit(ast.parse(text)))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_source_but_for_imports(name: str) -> None:
    first, _, rest = FILES[name].partition("\n")
    origin = re.fullmatch(r"# titans_dist/(\S+) of titans-dist \S+", first)
    assert origin is not None
    source = (ROOT / origin[1]).read_text()
    assert without_imports(rest) == without_imports(source)


@pytest.mark.parametrize("name", FILES)
def test_a_file_needs_torch_transformers_and_safetensors_alone(name: str) -> None:
    for node in imports(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            targets = [node.module] if node.module else [alias.name for alias in node.names]
            assert all(f"{target}.py" in FILES for target in targets), ast.unparse(node)
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for top in {name.split(".")[0] for name in names}:
                assert top in {"torch", "transformers", "safetensors"} or top in sys.stdlib_module_names


def test_every_imported_name_is_defined_where_it_is_looked_for() -> None:
    for text in FILES.values():
        for node in imports(text):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:
                tree = ast.parse(FILES[f"{node.module}.py"]).body
                made = {getattr(item, "name", None) for item in tree} | {"__doc__"}
                for item in tree:
                    targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                    made |= {target.id for target in targets if isinstance(target, ast.Name)}
                assert {alias.name for alias in node.names} <= made, ast.unparse(node)


def test_transformers_finds_every_file_of_the_configuration_and_of_the_model() -> None:
    """It copies what relative imports of the file itself name, by this expression, and goes no further."""
    named = {
        entry: {f"{name}.py" for name in re.findall(r"^\s*from\s+\.(\S+)\s+import", FILES[entry], re.MULTILINE)}
        for entry in ENTRIES
    }
    assert named["modeling_titans.py"] == FILES.keys() - {"modeling_titans.py"}
    for entry, names in named.items():
        for other in names:
            found = re.findall(r"^\s*from\s+\.(\S+)\s+import", FILES[other], re.MULTILINE)
            assert {f"{name}.py" for name in found} <= names | {entry}


def test_the_configuration_needs_no_layers() -> None:
    assert not re.search(r"^\s*from\s+\.(layers|model|memory)_", FILES["configuration_titans.py"], re.MULTILINE)
