"""Write the generated files: the JSON schema of recipes and the pages of docs/reference.

    python tools/reference.py

`tests/integration/test_reference.py` fails if one of them is stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from convlens.recipe_reference import SCHEMA_FILE, recipe_schema

REPOSITORY = Path(__file__).resolve().parents[1]


def schema_page() -> str:
    """Return the JSON schema of recipes."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    f"src/convlens/recipes/{SCHEMA_FILE}": schema_page,
}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        path = REPOSITORY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
