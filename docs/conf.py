"""Sphinx configuration; `make docs` builds the site with warnings as errors."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

from pyro_ssvi import __version__

project = "pyro_ssvi"
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3  # of links to a part of a page
html_math_renderer = "mathml"
html_show_copyright = False
html_theme = "furo"
html_title = f"pyro_ssvi {__version__}"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"

# Tutorials are notebooks kept as text. They run anew when their code has changed.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 1800  # of a cell; on a quiet machine a page takes a minute
nb_merge_streams = True
nb_execution_show_tb = True
nb_output_stderr = "remove"


def setup(app):
    """Formulas as MathML, which browsers show without a script from elsewhere."""

    def visit(display):
        def append(writer, node):
            writer.body.append(convert(node.astext(), display=display))
            raise SkipNode

        return append

    app.add_html_math_renderer("mathml", (visit("inline"), None), (visit("block"), None))
