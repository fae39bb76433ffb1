"""`--help` in a terminal of 80 columns."""

import re

import pytest
from typer.main import get_command

from cnnft.cli.app import app
from cnnft.config.options import option_of
from cnnft.config.panels import MAIN, PANELS
from cnnft.config.schema import FIELDS, flag

GROUP = get_command(app)
COMMANDS = GROUP.commands


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_breaks_no_word(cnnft, name: str) -> None:
    outcome = cnnft(*[name] * bool(name), "--help")
    assert outcome.code == 0
    assert all(len(line) <= 80 for line in outcome.out.splitlines())
    assert not re.search(r"<?bool(ean)?>?\b", outcome.out, re.IGNORECASE)
    printed = set(re.sub("[│╭╮╰╯─]", " ", outcome.out).split())
    command = COMMANDS[name] if name else GROUP
    texts = [command.help, *(parameter.help for parameter in command.params)]
    words = {word for text in texts for word in re.sub(r"\[/?dim\]|\\", "", text).split()}
    flags = {f for p in command.params for f in (*p.opts, *p.secondary_opts) if f[0] == "-"}
    assert len(words) > 3 and not (words | flags) - printed


def test_finetune_lists_first_what_most_people_need(cnnft) -> None:
    shown = cnnft("finetune", "--help").out
    panels = re.findall(r"^╭─ (.+?) ─", shown, re.MULTILINE)
    assert panels == ["Arguments", *PANELS]
    main = shown.split(MAIN)[1].split("╰")[0]
    flags = re.findall(r"^│ (--[\w-]+)", main, re.MULTILINE)
    assert {"--backbone", "--mode", "--epochs", "--batch-size", "--lr", "--name"} <= set(flags)
    assert len(flags) <= 13


def test_every_setting_with_a_panel_has_its_flag_and_the_rest_have_none() -> None:
    flags = {name for p in COMMANDS["finetune"].params for name in p.opts}
    for name, field in FIELDS.items():
        if name != "data":
            assert (f"--{name.replace('_', '-')}" in flags) == (option_of(field).panel is not None)
            assert (flag(name) in flags) == (option_of(field).panel is not None)
