"""Fixtures in the published layouts."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def editable(tmp_path):
    """A function that copies a fixture, so that a test may spoil it."""
    return lambda name: Path(shutil.copytree(Path(__file__).parent / "fixtures" / name, tmp_path / name))
