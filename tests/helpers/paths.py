"""Folders of the repository, for tests that read its files."""

from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
REPOSITORY = TESTS.parent
