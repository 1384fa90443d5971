"""A small model without problems, once, and a copy of it for each test to break."""

import shutil
from pathlib import Path

import pytest
from cpu.server.model_folder import write_model_folder


@pytest.fixture(scope="session")
def clean_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("clean") / "model")


@pytest.fixture
def folder(clean_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean_model, tmp_path / "model"))
