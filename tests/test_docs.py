"""The documents say what is there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from cnnft.cli.app import app
from cnnft.config.options import option_of
from cnnft.config.pixels import AugmentationConfig
from cnnft.config.schema import FIELDS, flag
from cnnft.data.augmentation import PRESETS
from cnnft.data.images import SUFFIXES
from cnnft.data.names import SYSTEM
from tools import options

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme_and_explains_itself(name):
    assert f"cnnft {name} " in README or f"`{name} " in README or f"**{name.title()}**" in README
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help, f"{name}: {parameter.name} has no help"


def test_every_flag_in_the_readme_exists():
    known = {flag for command in COMMANDS.values() for p in command.params for flag in p.opts}
    known |= {
        flag for command in COMMANDS.values() for p in command.params for flag in p.secondary_opts
    }
    known |= {"--help", "--debug", "--version"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"make ([a-z-]+) ", README + CONTRIBUTING))
def test_every_make_target_that_is_named_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_table_of_images_names_every_suffix_and_every_ignored_name():
    words = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?<=\s)\.[a-z]+(?=\s)", words.split("(in any case)")[0])) == SUFFIXES
    words = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").lower()
    assert all(f"`{name}`" in words for name in SYSTEM)


def test_the_tables_of_augmentation_name_every_preset_and_every_part_without_a_flag():
    text = (ROOT / "docs" / "augmentation.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`[^=|]*\|", text, re.MULTILINE)[: len(PRESETS)] == list(PRESETS)
    rare = [part.name for part in fields(AugmentationConfig) if option_of(part).panel is None]
    assert len(rare) > 10 and all(f"`{name}" in text for name in rare)


def test_ci_runs_lint_and_then_test():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["make lint", "make test"]


def test_the_page_of_options_is_what_the_declarations_say():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert options.tables() in page, "python -m tools.options"
    assert all(f"`{flag(name)}`" in page for name in FIELDS if name != "data")
