"""Load the shipped configuration files as modules."""

import importlib.util
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
