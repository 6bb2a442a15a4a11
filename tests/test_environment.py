"""One list of versions: conda's file, the Makefile, CI and the README all lead to pyproject.toml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml

from agd_lib.project import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_importing_the_library_imports_nothing_heavy() -> None:
    """What it takes beyond torch is loaded when it is first used."""
    heavy = ("torch", "diffusers", "transformers", "matplotlib", "scipy", "accelerate", "sklearn", "pandas")
    code = f"import sys, agd_lib; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def conda() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def test_every_version_is_pinned(project: dict[str, Any]) -> None:
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert re.fullmatch(r"[\w-]+==[\w.]+", requirement), requirement


def test_the_lock_file_has_those_versions_with_hashes(project: dict[str, Any]) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.findall(
        r"^([\w.-]+)==([\w.+-]+)([^\n]*)\n((?: +--hash=sha256:[0-9a-f]{64}[^\n]*\n)+)", lock, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^[\w.-]+(?:==| @)", lock, re.MULTILINE))
    locked = {(name, version) for name, version, marker, _ in entries if "python" not in marker}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert tuple(requirement.split("==")) in locked, f"{requirement} is not locked: run make lock"


def test_conda_brings_python_and_pip_and_nothing_else(conda: dict[str, Any], project: dict[str, Any]) -> None:
    python, pip, packages = conda["dependencies"]
    assert pip == "pip" and packages == {"pip": ["-e .[dev]"]}
    asked = re.fullmatch(r"python=(\d+)\.(\d+)", python)
    assert asked
    low, high = re.findall(r"(\d+)\.(\d+)", project["requires-python"])
    version = (int(asked[1]), int(asked[2]))
    assert tuple(map(int, low)) <= version < tuple(map(int, high))


def test_make_looks_for_the_pythons_that_the_project_takes(project: dict[str, Any]) -> None:
    low, high = re.findall(r"(\d+)\.(\d+)", project["requires-python"])
    assert f"({low[0]}, {low[1]}) <= sys.version_info[:2] < ({high[0]}, {high[1]})" in MAKEFILE
    assert f"python{low[0]}.{low[1]}" in MAKEFILE


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


def test_the_readmes_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"reproduce", "test", "lab"} <= named <= targets
