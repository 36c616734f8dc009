"""The entry script of the benchmarks, without a GPU and without running any."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import run_all


def test_the_entry_script_runs_every_job_once_and_names_those_that_fail(monkeypatch, tmp_path, capsys):
    ran = []

    def job(command, **options):
        ran.append((options["env"]["CUDA_VISIBLE_DEVICES"], command[1:]))
        assert command[1] == "-m" or Path(command[1]).is_file()
        for flag in ("--config", "--output"):
            if flag in command:
                assert Path(command[command.index(flag) + 1]).parent.is_dir()
        return SimpleNamespace(returncode=int("prefill" in command[1]))

    monkeypatch.setattr(run_all.subprocess, "run", job)
    monkeypatch.setattr("sys.argv", ["run_all.py", "--gpus", "0", "1", "--logs", str(tmp_path / "logs")])
    with pytest.raises(SystemExit, match="failed: prefill"):
        run_all.main()
    names = list(run_all.jobs(Path(), Path()))
    assert len(ran) == len(names)
    assert {gpu for gpu, _ in ran} <= {"0", "1"}
    assert sorted(path.stem for path in (tmp_path / "logs").iterdir()) == sorted(names)
    assert "prefill: FAILED" in capsys.readouterr().out
    ran.clear()
    monkeypatch.setattr("sys.argv", ["run_all.py", "--only", "tests", "--logs", str(tmp_path / "logs")])
    run_all.main()
    assert [command[:2] for _, command in ran] == [["-m", "pytest"]]
