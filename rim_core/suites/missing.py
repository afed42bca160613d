"""What a suite lacks, and how to build it; read from files alone, since what only lists must not wait for torch."""

from functools import cache
from typing import Any

import yaml

from rim_core import paths
from rim_core.suites.schema import Suite


@cache
def recipes() -> dict[str, Any]:
    """Each role's recipe, by name, from `organisms/recipes.yml`."""
    text = (paths.PACKAGE / "organisms" / "recipes.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def how_to_build(suite: Suite, role: str, ref: str | None = None) -> str:
    """Name the command that gives a suite a role that it lacks.

    Suites that ship with the package are not changed: one of the user's own, with the same base, gets the role.
    `ref` is what the suite was given as, where that is not its name.
    """
    trained, ref = recipes(), ref or suite.name
    if role not in trained:
        return f"no recipe builds it, name one: rim suite new NAME --base {ref} --role {role}=REF"
    if suite.name in paths.shipped_suites():
        return f"rim suite new NAME --base {suite.name}, then rim organisms train --suite NAME {role}"
    parent = trained[role]["parent"]
    first = f" (after {parent})" if parent and not suite.has(parent) else ""
    return f"rim organisms train --suite {ref} {role}{first}"
