"""Configuration of Sphinx: `make docs` builds the HTML pages in docs/_build, without a network."""

import inspect
import re
from typing import Any

import blocksparse_jax

project = "blocksparse_jax"
author = "The blocksparse_jax authors"
copyright = "The blocksparse_jax authors"
release = blocksparse_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "blocksparse_jax"
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
nitpicky = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
