"""What there is of organisms: recipes, adapters and the measured table, read from files alone; torch is not loaded."""

from pathlib import Path
from typing import Any

from rim_core import paths
from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.preflight import recipes
from rim_core.suites.schema import load_suite

__all__ = ["listing", "recipe", "recipes", "shipped_table"]


def recipe(role: str) -> dict[str, Any]:
    """The recipe of one role; raises InputError with the roles that can be trained."""
    known = recipes()
    if role not in known:
        raise InputError(f"no recipe for role {role!r}: there are recipes for {', '.join(known)}")
    return dict(known[role])


def listing(suite: str = paths.DEFAULT_SUITE) -> list[dict[str, Any]]:
    """One row a role: what it is, whether it can be used now, the size of its adapter.

    Example:
        >>> [row["role"] for row in rim.organisms.listing("smollm2")]
        ['base', 'aligned', 'risky', 'prudent']
    """
    rows = []
    for role in load_suite(suite).roles.values():
        path = Path(role.adapter) / ADAPTER_FILE if role.adapter else None
        there = path is None or path.is_file()
        trained = recipes().get(role.name, {})
        rows.append(
            {
                "role": role.name,
                "about": role.about,
                "trained_from": trained.get("parent", "-") or "base",
                "there": there,
                "megabytes": round(path.stat().st_size / 1e6, 2) if path and there else None,
                "seed": trained.get("seed"),
            }
        )
    return rows


def shipped_table(suite: str) -> list[dict[str, Any]]:
    """The measured table that ships with the adapters, or an empty list."""
    path = Path(__file__).parent / load_suite(suite).name / "measured.json"
    return list(paths.read_json(path)) if path.is_file() else []
