"""Configuration of Sphinx: `make docs` builds the HTML pages in docs/_build, without a network."""

import blocksparse_jax

project = "blocksparse_jax"
author = "The blocksparse_jax authors"
copyright = "The blocksparse_jax authors"
release = blocksparse_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "blocksparse_jax"
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
default_role = "literal"  # `x` in a docstring is code

myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
