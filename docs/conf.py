"""How the pages are built: ``pip install -e .[docs]`` and ``sphinx-build docs docs/_build``."""

from __future__ import annotations

import shmarray

project = "shmarray"
author = "the shmarray authors"
release = version = shmarray.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "alphabetical"
default_role = "code"
