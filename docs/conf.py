"""How Sphinx makes the documentation's site of docs/: see `make docs`.

Nothing is fetched, neither while the pages are made nor while they are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

from dalle1.version import __version__

project = "dalle1"
author = "The dalle1 authors"
version = release = __version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_help",
    "docstrings",
]
exclude_patterns = ["extensions", "_static"]
nitpicky = True  # a name that leads nowhere is a warning, and a warning ends `make docs`
OTHERS = (
    *("PIL", "collections", "contextlib", "numpy", "os", "pathlib", "pydantic", "random"),
    *("tokenizers", "torch", "typing"),
)
NO_PAGE = (
    *("Family", "Loss", "Losses", "Origin", "Preprocessing", "PublishedModel", "ResidualLayer"),
    *("Seq2SeqState", "TransformerState", "Variant"),
)
# Types of others, whose pages are on the network, and types of ours that have no page.
nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(OTHERS)})\..*"),
    (r"py:class", rf"dalle1\.(common|published|seq2seq|transformer)\.\w+\.({'|'.join(NO_PAGE)})"),
]

# Markdown as GitHub shows it.
myst_heading_anchors = 4
smartquotes_action = "D"  # dashes alone; options are code, so that theirs stay

# Docstrings: Google's style, with `names` between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"dalle1 {release}"
html_show_sourcelink = False
html_copy_source = False
