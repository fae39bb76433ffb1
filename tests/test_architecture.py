"""The house rules that a machine can check."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cnnft

PACKAGE = Path(cnnft.__file__).parent

ORDER = [
    {"errors", "metrics"},
    {"config"},
    {"machine"},
    {"data"},
    {"models"},
    {"inference"},
    {"cache", "runs"},
    {"probe"},
    {"training", "analysis"},
    {"cli"},
]
"""Bottom to top: a package imports from lower ones only, so never from one beside it."""

LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
DOORS = {"__init__", "__main__"}
"""Of the whole: they may open any package."""


def modules() -> list[Path]:
    paths = PACKAGE.rglob("*.py")
    return sorted(path for path in paths if path.parent != PACKAGE or path.stem not in DOORS)


def dotted(path: Path) -> str:
    """cnnft/data/sources.py -> data.sources"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of cnnft that the file imports, also inside functions; not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cnnft":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("cnnft.")}
    known = {dotted(other) for other in PACKAGE.rglob("*.py")}
    found = set()
    for name in names - {"cnnft.__version__"}:
        module = name.removeprefix("cnnft.")
        found.add(module if module in known else module.rpartition(".")[0])
    return found


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_packages_import_from_lower_ones_only(path):
    here = dotted(path).partition(".")[0]
    for other in imports(path):
        there = other.partition(".")[0]
        assert there == here or LEVEL[there] < LEVEL[here], f"{dotted(path)} imports {other}"


def test_no_two_modules_import_each_other():
    graph = {dotted(path): imports(path) - {dotted(path)} for path in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_package_has_its_place():
    assert {dotted(path).partition(".")[0] for path in modules()} == LEVEL.keys()


def test_modules_and_functions_are_short():
    """Some 300 lines a module, 60 a function, but for tables of declarations."""
    for path in modules():
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 330, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                declared = path.parent.name == "cli" and node.name == "command"
                assert lines <= 60 or declared, f"{path}: {node.name} has {lines} lines"


def test_functions_take_few_parameters():
    for path in modules():
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                assert count <= 8, f"{path}: {node.name} has {count} parameters"


def test_only_the_command_line_prints():
    for path in modules():
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Name) and node.id == "print"), path


def test_architecture_md_names_every_module_and_no_other():
    """The table of packages: `package` | `module`, ... | what it knows."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    found, package = set(), ""
    for line in text.partition("| package | module |")[2].partition("\n\n")[0].splitlines()[2:]:
        first, second, third = (cell.strip() for cell in line.split("|")[1:4])
        package = first.strip("`") or package
        for name in re.findall(r"`(\w+)`", third if package == "cli" else second):
            found.add(f"{package}.{name}")
    known = {dotted(path).replace("surgery.", "") for path in modules() if path.stem != "__init__"}
    assert known - found == {"errors", "metrics"}
    assert {name for name in found - known if not name.startswith("cli.")} == set()


def test_nothing_is_timed_by_a_clock_that_jumps():
    """Intervals are measured on the monotonic clock; the wall clock only stamps the log."""
    for path in modules():
        source = path.read_text(encoding="utf-8")
        assert "time.time(" not in source, path
        assert "datetime.now" not in source or path.name == "console.py", path
