"""Sphinx configuration; `make docs` builds the site with warnings as errors."""

from pyro_ssvi import __version__

project = "pyro_ssvi"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["deflist", "dollarmath"]
html_theme = "furo"
html_title = f"pyro_ssvi {__version__}"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"

# Tutorials are notebooks kept as text. They run anew when their code has changed.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # of a cell; on a quiet machine a page takes a minute
nb_merge_streams = True
nb_execution_show_tb = True
nb_output_stderr = "remove"
