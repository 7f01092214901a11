"""The version, in the only place; pyproject.toml reads it here."""

__version__ = "0.1.0"
