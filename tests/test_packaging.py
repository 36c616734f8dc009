"""The wheel holds every module and data file of the two packages, and importing needs neither Triton nor Lightning."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"lightning_sea": ROOT / "lightning_sea", "sea_kernels": ROOT / "kernels" / "sea_kernels"}


def source_files(pattern: str) -> set[str]:
    """Files of both packages by the path they have in a wheel."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in SOURCES.items()
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def copy_sources(destination: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("lightning_sea", "kernels"):
        shutil.copytree(ROOT / name, destination / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, destination / name)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_setup_cfg_names_every_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    named = parser["options"]["packages"].split()
    found = {Path(file).parent.as_posix().replace("/", ".") for file in source_files("*.py")}
    assert sorted(named) == sorted(found)


def test_the_kernels_folder_is_no_package():
    # An importable package called "kernels" would hide the Hugging Face package of that name from transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_holds_every_file_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # setuptools leaves a build folder beside what it builds, and reuses it
    copy_sources(source)
    # without build isolation the installed setuptools builds, so that no network is needed
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("lightning_sea-*.whl")
    content = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packaged = {name for name in content if ".dist-info/" not in name}
    assert packaged == source_files("*")
    assert any(name.endswith("/licenses/LICENSE") for name in content)


HIDE_TRITON = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "triton" else find_spec(name, *rest))
"""


def test_kernels_import_without_triton_and_without_lightning():
    code = HIDE_TRITON + (
        "import sys, sea_kernels, sea_kernels.backend\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sea_kernels.backend.has_triton(), loaded & {'triton', 'lightning', 'transformers', 'lightning_sea'})"
    )
    assert run_python(code) == "False set()"


def test_lightning_sea_imports_without_triton():
    assert run_python(HIDE_TRITON + "import lightning_sea.cli, lightning_sea.callbacks\nprint('ok')") == "ok"
