"""Which code made a result."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_sea import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in which the module believes to lie."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in ("lightning_sea/environment.py", "kernels/code.py", "benchmarks/results/old.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("first\n")
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "lightning_sea/environment.py"))
    return tmp_path


def head(checkout: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()


def test_results_are_no_change_of_what_makes_them(checkout):
    assert environment.commit() == head(checkout)
    (checkout / "benchmarks/results/old.json").write_text("second\n")
    (checkout / "benchmarks/results/new.json").write_text("first\n")
    assert environment.commit() == head(checkout)
    (checkout / "kernels/code.py").write_text("second\n")
    assert environment.commit() == head(checkout) + "+changes"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() == "unknown"
