"""The wheel: it installs by itself, with the command and all its files, and works away from the checkout.

With WHEEL_TEST_DOWNLOADS=1 (`make wheel-test`) torch and the rest are downloaded as a user's pip does; else they
come from the environment of the tests, and nothing is downloaded.
"""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
from toy import write_corpus

import ser

pytest.importorskip("setuptools")
pytest.importorskip("pip")
ROOT = Path(__file__).parents[1]
NAME = "ser-speech"
OTHERS = ("tests", "examples", "benchmarks", "docs")  # folders that stay in the checkout
DOWNLOADS = os.environ.get("WHEEL_TEST_DOWNLOADS") == "1"


def run(*command: str | Path, cwd: Path, timeout: int = 300) -> str:
    """What a command prints; it sees nothing of the checkout, and must end well."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the source, beside which the other folders look like packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    copytree(ROOT / "ser", source / "ser", ignore=ignore_patterns("__pycache__"))
    for name in OTHERS:
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The folder of python and ser of a new virtual environment with the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check"]
    if not DOWNLOADS:
        options += ["--no-deps", "--no-index"]
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        # The paths themselves: .pth files in them (such as that of an editable installation of ser) are not run.
        borrowed = f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
        (Path(site) / "borrowed.pth").write_text(borrowed)
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder, timeout=3000)
    return python.parent


def test_an_installed_package_imports_from_another_folder_with_all_its_files_and_metadata(programs, tmp_path):
    code = f"""
    import importlib.metadata, pathlib
    import ser
    from ser.data.manifest import read_manifest
    from ser.train.loop import fit
    print(ser.__file__)
    metadata = importlib.metadata.metadata({NAME!r})
    print(metadata["Version"], ser.__version__)
    print(*sorted(r.split(">")[0] for r in metadata.get_all("Requires-Dist") if "extra" not in r))
    print(*sorted(metadata.get_all("Provides-Extra")))
    package = pathlib.Path(ser.__file__).parent
    files = [p for p in package.rglob("*") if p.suffix != ".pyc" and p.is_file()]
    print(*sorted(str(p.relative_to(package)) for p in files))
    """
    origin, version, requirements, extras, files = run(
        programs / "python", "-c", textwrap.dedent(code), cwd=tmp_path
    ).splitlines()
    assert Path(origin).is_relative_to(programs.parent), "not the installed copy"
    assert version == f"{ser.__version__} {ser.__version__}"
    assert requirements.split() == ["numpy", "safetensors", "soundfile", "torch", "torchaudio", "tqdm"]
    assert {"demo", "hub", "plots", "lint", "test"} <= set(extras.split())
    source = {str(p.relative_to(ROOT / "ser")) for p in (ROOT / "ser").rglob("*") if p.is_file()}
    expected = {name for name in source if not name.endswith(".pyc")}
    assert set(files.split()) == expected and "py.typed" in expected
    site = Path(origin).parents[1]
    assert not [name for name in OTHERS if (site / name).exists()]


def test_the_installed_command_trains_and_recognises_three_files(programs, tmp_path):
    command = programs / "ser"
    assert run(command, "--version", cwd=tmp_path) == f"ser {ser.__version__}\n"
    assert run(programs / "python", "-m", "ser", "--help", cwd=tmp_path) == run(command, "--help", cwd=tmp_path)
    write_corpus(tmp_path / "data", 3)
    options = "--init small --epochs 1 --effective-batch 2 --heads emotion --threads 1 --out run"
    run(command, "train", "--train", "data/train.csv", *options.split(), cwd=tmp_path)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    printed = run(command, "predict", "data/train.csv", "--model", "run/best", "--format", "csv", cwd=tmp_path)
    rows = list(csv.DictReader(printed.splitlines()))
    assert len(rows) == 3 and {row["emotion"] for row in rows} <= set(settings["labels"])
    assert not any(row["error"] for row in rows)
