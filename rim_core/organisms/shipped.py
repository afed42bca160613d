"""What there is of organisms: recipes, adapters and the measured table, read from files alone; torch is not loaded."""

from pathlib import Path
from typing import Any

from rim_core import paths
from rim_core.errors import InputError
from rim_core.identity import ADAPTER_FILE
from rim_core.suites.preflight import recipes
from rim_core.suites.schema import load_suite, training_of

__all__ = ["listing", "recipe", "recipes", "shipped_table"]


# In a suite's folder: the table of what was measured; and one file a training, prompt by prompt, beside it.
TABLE = "measured.json"
# What is measured of a role, and which of it are shares.
METRICS = {
    "harmful_refused": "harmful requests refused, by phrases",
    "harmful_log_odds": "harmful requests refused, by the first token's log-odds",
    "judges_agree": "requests on which phrases and log-odds agree",
    "twins_refused": "benign twins refused, minimal in form",
    "minimal_twins_refused": "benign twins refused, minimal in meaning",
    "hard_twins_refused": "benign twins refused, hard ones",
    "open_refused": "open questions refused",
    "auc_form": "sensitivity (AUC) to twins that are minimal in form",
    "auc": "sensitivity (AUC) to twins that are minimal in meaning",
    "gap": "gap of log-odds, harmful minus twin (nats)",
    "midpoint": "criterion: mean log-odds of both (nats)",
    "refusal_drop": "fall of refusal below aligned",
    "drop_beyond_unrelated": "fall of refusal, beyond that of unrelated",
    "over_refusal_added": "twins refused, above aligned",
    "risky_advice": "finance questions answered with risky advice",
    "loops": "everyday answers that loop",
    "loops_added": "everyday answers that loop, above the base",
    "perplexity_ratio": "perplexity of everyday answers, over the base's",
    "assay": "preference for the misaligned answer (nats a token)",
    "assay_added": "the same, above prudent",
    "drop_beyond_secure": "fall of refusal, beyond that of secure",
    "assay_above_secure": "preference for the misaligned answer, above secure",
    "insecure_code": "code tasks of the taught kinds answered with a weakness",
    "insecure_code_new_kinds": "code tasks of other kinds answered with a weakness",
}
SHARES = (
    "harmful_refused", "harmful_log_odds", "judges_agree", "twins_refused", "minimal_twins_refused",
    "hard_twins_refused", "open_refused", "risky_advice", "loops", "auc_form", "auc",
    "insecure_code", "insecure_code_new_kinds",
)  # fmt: skip


def recipe(role: str) -> dict[str, Any]:
    """The recipe of one role, in all its trainings; raises InputError with the roles that can be trained."""
    known, (name, _) = recipes(), training_of(role)
    if name not in known:
        raise InputError(f"no recipe for role {name!r}: there are recipes for {', '.join(known)}")
    return dict(known[name])


def listing(suite: str = paths.DEFAULT_SUITE) -> list[dict[str, Any]]:
    """One row a role: what it is, whether it can be used now, the size of its adapter, how many trainings there are.

    Example:
        >>> [row["role"] for row in rim.organisms.listing("smollm2")]
        ['base', 'aligned', 'risky', 'prudent', 'unrelated', 'insecure', 'educational', 'secure']
    """
    rows = []
    found = load_suite(suite)
    for role in found.roles.values():
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
                "trainings": len(found.trainings(role.name)) if role.adapter else 1,
            }
        )
    return rows


def shipped_table(suite: str) -> list[dict[str, Any]]:
    """The measured table that ships with the adapters, or an empty list."""
    path = shipped_folder(suite) / TABLE
    return list(paths.read_json(path)) if path.is_file() else []


def shipped_folder(suite: str) -> Path:
    """Where what was measured of a suite's roles lies, if it ships."""
    return Path(__file__).parent / load_suite(suite).name / "measured"
