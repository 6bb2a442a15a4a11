"""Fixtures: small base models in memory and on disk, see ``small_models.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers.utils.logging import disable_progress_bar
from small_models import write_dit_folder

from agd_lib.base_models import DiTBase, load_base

disable_progress_bar()


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with 5 named classes, 4 output channels, DDIM, epsilon. Read only: copy it to change it."""
    return write_dit_folder(tmp_path_factory.mktemp("bases") / "five-classes")


@pytest.fixture
def dit_base(dit_folder: Path) -> DiTBase:
    """:func:`dit_folder`, freshly loaded: attach to it and change it freely."""
    base = load_base(dit_folder)
    assert isinstance(base, DiTBase)
    return base


@pytest.fixture(scope="session")
def dit1000_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like DiT-XL/2: 1,000 classes (null class 1000, which ``DiTPipeline`` hard-codes), 4 + 4 output channels."""
    folder = tmp_path_factory.mktemp("bases") / "thousand-classes"
    return write_dit_folder(folder, num_classes=1000, out_channels=8, num_layers=2, names=None)


@pytest.fixture
def dit1000_base(dit1000_folder: Path) -> DiTBase:
    """:func:`dit1000_folder`, freshly loaded."""
    base = load_base(dit1000_folder)
    assert isinstance(base, DiTBase)
    return base
