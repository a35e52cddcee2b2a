"""Whence traces a language model back to its data."""

__version__ = "0.1.0"
