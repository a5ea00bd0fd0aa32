"""The version, written here only: the build reads it, the package shows it."""

__version__ = "0.1.0"
