"""Every command and every line of Python in the README works, and every file that it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sea.cli import SEACLI, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class ParsingCLI(SEACLI):
    """Reads arguments and builds nothing."""

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "lightning-sea":
        run(arguments, cli_class=ParsingCLI)
    elif program == "pip":
        assert arguments[0] == "install"
        assert all((ROOT / path).exists() for path in arguments[1:] if not path.startswith("-"))
    else:
        raise AssertionError(f"no way to check {program!r}: teach it to this test")


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words)


def test_the_commands_name_both_make_targets_and_the_command_line():
    programs = [words[:2] for words in commands()]
    assert ["make", "demo"] in programs
    assert ["make", "test"] in programs
    assert ["lightning-sea", "fit"] in programs


def test_python_blocks_run(tmp_path):
    (tmp_path / "readme.py").write_text("\n".join(blocks("python")), encoding="utf-8")
    result = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "my-sea-model" / "model.safetensors").is_file()


def test_links_and_named_files_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    configs = re.findall(r"configs/[\w./]+\.yaml", README)
    assert linked
    assert configs
    missing = [path for path in {*linked, *configs} if not (ROOT / path).exists()]
    assert not missing
