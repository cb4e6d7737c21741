"""Tiny random models and processors, for tests and `--tiny`."""
