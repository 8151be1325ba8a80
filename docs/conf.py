"""Sphinx configuration; `make docs` builds the site with warnings as errors."""

from pyro_ssvi import __version__

project = "pyro_ssvi"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["deflist", "dollarmath"]
html_theme = "furo"
html_title = f"pyro_ssvi {__version__}"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
