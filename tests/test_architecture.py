"""The house rules that a machine can check."""

import ast
from pathlib import Path

import pytest

import cnnft

PACKAGE = Path(cnnft.__file__).parent

LAYERS = [
    {"errors"},
    {"distributed"},
    {"values"},
    {"config", "recipes"},
    {"images", "downloads", "files", "environment"},
    {"transforms", "hub", "cachefolder"},
    {"data", "augmentation"},
    {
        "batches",
        "heads",
        "stages",
        "freezing",
        "substitution",
        "optim",
        "schedules",
        "metrics",
        "advice",
        "acceleration",
    },
    {"zoo", "objectives", "averaging", "constraints"},
    {"pretrained"},
    {"backbones", "catalogue"},
    {"inference", "training", "cutting", "folding"},
    {"memory"},
    {"pixelcache", "featurecache"},
    {"classifier", "probing"},
    {"checkpoints", "teaching"},
    {"rundirs"},
    {"run"},
    {"tensorboard"},
    {"planning"},
    {"feeding"},
    {"session"},
    {
        "finetuning",
        "evaluation",
        "exporting",
        "datacheck",
        "comparison",
        "plotting",
        "contactsheet",
    },
    {"cli"},
]
"""Bottom to top: a module imports from lower layers only."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


DOORS = {"__init__", "__main__"}  # of the package: they may open any room


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if room(path) not in DOORS)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of cnnft that the file imports, also inside functions; not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and node.module == "cnnft":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnnft."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cnnft.")}
    return found - {"__version__"}


def test_every_module_has_a_layer():
    rooms = {room(path) for path in modules()}
    assert rooms == LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    upward = {
        other for other in imported_rooms(path) if other != here and LEVEL[other] >= LEVEL[here]
    }
    assert not upward, f"{here} imports {upward}"


def test_the_library_never_prints():
    for path in modules():
        if room(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Name) and node.id == "print"), path


def test_no_module_is_named_like_a_public_function():
    public = {"finetune", "load", "predict", "evaluate", "export"}
    assert not public & LEVEL.keys()


def test_architecture_md_names_every_room():
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for name in LEVEL:
        assert f"{name}.py" in text or f"{name}/" in text, f"ARCHITECTURE.md does not name {name}"


def test_nothing_is_timed_by_a_clock_that_jumps():
    """Intervals are measured on the monotonic clock; the wall clock only stamps the log."""
    for path in modules():
        source = path.read_text(encoding="utf-8")
        assert "time.time(" not in source, path
        assert "datetime.now" not in source or path.name == "console.py", path
