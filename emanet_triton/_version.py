"""The version, where pyproject.toml and reports read it."""

__version__ = "0.1.0"
