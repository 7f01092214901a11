"""Other people's public models of the family, read as they are published.

`load` opens one, `import_model` writes it as a folder of ours. One module a family;
`dalle1.published.table` lists them, and `dalle1.published.parts` says what a reader gives.
"""

from dalle1.published.importing import Imported, import_model, load, read
from dalle1.published.table import families, find_family

__all__ = ["Imported", "families", "find_family", "import_model", "load", "read"]
