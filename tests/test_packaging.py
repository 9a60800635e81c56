"""The wheel holds what the repository holds: no package forgotten, none left over."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import holdfast

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOOR = "holdfast"
ROOMS = ("kvstore", "eviction", "engine_adapter", "ring_attention")


def repository_files() -> list[str]:
    """Return every file of the working tree that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    names = sorted(set(filter(None, listing.stdout.split("\0"))))
    return [name for name in names if (ROOT / name).is_file()]


def expected_content(files: list[str]) -> dict[str, bytes]:
    """Return the package's files by their place in the wheel."""
    expected = {}
    for name in files:
        path = PurePosixPath(name)
        if path.suffix == ".py" or path.name == "py.typed":
            if path.parts[0] in ROOMS:
                expected[f"{FRONT_DOOR}/{name}"] = (ROOT / name).read_bytes()
            elif path.parts[0] == FRONT_DOOR:
                expected[name] = (ROOT / name).read_bytes()
    return expected


def build_wheel(source: Path, target: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    done = subprocess.run([*command, *options, str(source)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def package_content(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    return {name: wheel.read(name) for name in wheel.namelist() if name.startswith(f"{FRONT_DOOR}/")}


@pytest.fixture(scope="module")
def files():
    return repository_files()


@pytest.fixture(scope="module")
def source(tmp_path_factory, files):
    # A copy, so that neither an old build/ folder nor a concurrent build leaks into this wheel.
    copy = tmp_path_factory.mktemp("source")
    wanted = {FRONT_DOOR, *ROOMS, "pyproject.toml", "LICENSE", "README.md"}
    for name in files:
        if PurePosixPath(name).parts[0] in wanted:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    with build_wheel(source, tmp_path_factory.mktemp("wheel")) as opened:
        yield opened


def test_wheel_holds_the_repository(wheel, files):
    expected, content = expected_content(files), package_content(wheel)
    assert sorted(content) == sorted(expected)
    assert content == expected
    assert f"{FRONT_DOOR}/py.typed" in content


def test_a_forgotten_package_is_noticed(source, files, tmp_path):
    broken = tmp_path / "source"
    shutil.copytree(source, broken, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    project = broken / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace('    "holdfast.eviction",\n', ""), encoding="utf-8")
    with build_wheel(broken, tmp_path) as without:
        missing = set(expected_content(files)) - set(package_content(without))
    assert "holdfast/eviction/__init__.py" in missing


def test_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {FRONT_DOOR}


def test_one_version(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert f"\nVersion: {holdfast.__version__}\n" in wheel.read(metadata).decode()
    assert project["version"] == holdfast.__version__


def test_the_command_is_installed(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(name).decode())
    assert dict(scripts["console_scripts"]) == {"holdfast": "holdfast.cli:main"}
