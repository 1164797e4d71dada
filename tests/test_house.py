"""The house: imports fall as docs/architecture.md says, importing costs little, the version has one place."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import omni_adapters

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "omni_adapters"
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`encoders/log_mel` for omni_adapters/encoders/log_mel.py; a package's index goes by its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def layers() -> dict[str, int | None]:
    """Module → layer, None for the island, from the table in docs/architecture.md."""
    table: dict[str, int | None] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        row = re.match(r"\| (\d+|island) \| (.*) \|$", line)
        if row:
            level = None if row[1] == "island" else int(row[1])
            for name in re.findall(r"`([\w/]+)`", row[2]):
                table[name] = level
    return table


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "omni_adapters":
            parent = node.module.split(".")[1:]
            for alias in node.names:  # `from omni_adapters import layout` imports a module, not a name
                whole = [*parent, alias.name]
                is_module = (PACKAGE.joinpath(*whole).with_suffix(".py")).exists()
                found.add("/".join(whole if is_module else parent))
        elif isinstance(node, ast.Import):
            found |= {"/".join(a.name.split(".")[1:]) for a in node.names if a.name.startswith("omni_adapters.")}
    return found - {""}


def test_every_module_has_a_place_in_the_table():
    assert set(layers()) == {name_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_never_rise(path):
    table = layers()
    level = table[name_of(path)]
    for name in imports_of(path):
        assert level is not None, "the island imports nothing of the package"
        if table[name] is None:
            assert name_of(path) == "training/hosts", f"{name} is an island: it is opened as other hosts are, by training/hosts"
        else:
            assert table[name] <= level, f"{name_of(path)} (layer {level}) imports {name} (layer {table[name]})"


def test_level_imports_have_no_cycles():
    edges = {name_of(path): imports_of(path) for path in MODULES}

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above, name])
        for below in edges[name]:
            walk(below, (*above, name))

    for name in edges:
        walk(name, ())


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


HEAVY = ["transformers", "modelscope", "triton", "soundfile", "soxr", "espeakng_loader", "huggingface_hub", "matplotlib",
         "requests"]
REQUIRED = ["torch", "numpy", "safetensors"]


@pytest.mark.parametrize("code, absent", [
    ("from omni_adapters import *", HEAVY),  # every public name, which the index imports when it is asked for
    ("import omni_adapters", HEAVY + REQUIRED),
    ("import omni_adapters.doctor", HEAVY + REQUIRED),
    ("import omni_adapters.cli; omni_adapters.cli.parser('doctor')", HEAVY + REQUIRED),
    ("import omni_adapters.cli; omni_adapters.cli.parser('eval')", HEAVY),
])
def test_import_brings_nothing_heavy(code, absent):
    assert python(f"{code}; import sys; print([m for m in {absent} if m in sys.modules])").strip() == "[]"


def test_all_public_names_cost_less_than_150_ms_above_torch():
    code = "import time, torch; t = time.process_time(); from omni_adapters import *; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.150  # seconds of this process; the least of five


def test_the_public_api_is_what_the_index_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    told = {alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"
            for alias in node.names if node.module != "importlib"}  # what type checkers are told
    for name in omni_adapters.__all__:
        assert getattr(omni_adapters, name) is not None and name in dir(omni_adapters)
        assert name == "__version__" or getattr(omni_adapters, name) is getattr(import_module(told.pop(name)), name)
    assert told == {}
    with pytest.raises(AttributeError, match="module 'omni_adapters' has no attribute 'Omni'"):
        omni_adapters.Omni  # noqa: B018
    documented = (ROOT / "README.md").read_text() + (ROOT / "docs" / "architecture.md").read_text()
    assert [name for name in omni_adapters.__all__ if name not in documented and name != "__version__"] == []


def test_version_has_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text()  # by pattern: tomllib is not in Python 3.10
    assert 'dynamic = ["version"]' in pyproject
    assert not re.search(r"^version = \"", pyproject, re.MULTILINE)
    assert f"## {omni_adapters.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
