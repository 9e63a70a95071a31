"""No test touches the home directory or a remote host."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import utils

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """Data folders below a temporary one, for this process and for scripts that it starts."""
    home = tmp_path_factory.mktemp("home")
    for name, variable in (("GENERATED", "REWIND_DATASETS"), ("D4RL", "D4RL_DATASET_DIR")):
        monkeypatch.setattr(utils, name, home / name.lower() / "datasets")
        monkeypatch.setenv(variable, str(home / name.lower() / "datasets"))
    monkeypatch.setattr(utils, "D4RL_URL", NOWHERE)
    monkeypatch.setenv("REWIND_D4RL_URL", NOWHERE)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    return home


def load_script(name):
    """datasets/<name>.py; not imported by name, because that may be the name of a package it needs."""
    spec = importlib.util.spec_from_file_location(f"rewind_{name}", ROOT / "datasets" / f"{name}.py")
    module, path = importlib.util.module_from_spec(spec), sys.path[:]
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)  # rewrites sys.path[0], which is its own only when it runs as a script
    finally:
        sys.path[:] = path
    return module


@pytest.fixture(scope="session")
def collector():
    return load_script("mujoco")
