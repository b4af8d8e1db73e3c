"""Configuration of the documentation site, built by launch/docs.sh."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_ext")]

import stoa_jax  # noqa: E402

project = "stoa_jax"
author = "the stoa_jax authors"
copyright = f"2026, {author}"
version = release = stoa_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "generated_pages",
    "mathml",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"stoa_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
# Links to files outside docs/ are checked by tests/docs_test.py.
suppress_warnings = ["myst.xref_missing"]

# Notebooks are stored as text and run while the site is built; an error in a cell fails the build.
# They see this checkout, and run on the CPU whatever accelerator is at hand.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
nb_execution_mode = "cache"
nb_execution_timeout = 1800  # seconds a cell may take, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
