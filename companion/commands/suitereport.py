"""What a suite needs and serves, as `rim suite` prints it."""

from companion.console import table
from rim_core import paths
from rim_core.errors import InputError
from rim_core.suites import sizing
from rim_core.suites.preflight import how_to_build, recipes
from rim_core.suites.schema import Suite
from rim_core.verdicts.schema import Claim, every_claim


def print_memory(size: sizing.Size) -> None:
    """Say what memory a model of this size takes by quantisation, and what there is."""
    rows = []
    for place, gpu in (("on a GPU", True), ("on the CPU", False)):
        needed = {name: _gigabytes(size.gigabytes(name, gpu)) for name in sizing.QUANTIZATIONS}
        rows.append({"memory needed": place, **needed})
    table(rows)
    there, gpu = sizing.memory_there()
    fits = [name for name in sizing.QUANTIZATIONS if size.gigabytes(name, gpu) <= there]
    kind = "GPU memory" if gpu else "memory, and no GPU"
    print(f"free here: {there:.1f} GB of {kind}; fits: {', '.join(fits) or 'in no quantisation'}")


def _gigabytes(amount: float) -> str:
    return f"{amount:.1f} GB" if amount >= 0.1 else "< 0.1 GB"


def print_time(size: sizing.Size) -> None:
    """Say about how long the notebooks take in a model of this size, and by which arithmetic."""
    print("time, by arithmetic and not measured:")
    if count := len(_notebooks()):
        print(
            f"  {count} notebooks at their default sizes, on 2 CPU cores: {_duration(size.notebook_hours(count))} "
            f"({sizing.NOTEBOOK_SECONDS} s each at {sizing.NOTEBOOK_WEIGHTS / 1e9:.2g} billion weights in the layers, "
            "in proportion)"
        )
    print(
        f"  paper C's patching at its size ({sizing.PAIRS} pairs of {sizing.TOKENS} tokens), on a GPU that sustains "
        f"{sizing.TERAFLOPS:g} TFLOP/s: {_duration(size.paper_hours)}"
    )


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "under a minute"
    return f"about {hours * 60:.0f} min" if hours < 1.5 else f"about {hours:.0f} h"


def print_serving(suite: Suite) -> None:
    """Say which notebooks and claims the suite can serve, and how to get the roles that it lacks."""
    rows, lacking = [], set()
    for notebook in _notebooks():
        decides: list[str] = []
        waits: dict[str, list[str]] = {}
        for claim in claims():
            if claim.metric.notebook != notebook:
                continue
            missing = [role for role in claim.roles if not suite.has(role)]
            lacking.update(missing)
            if missing:
                waits.setdefault(" and ".join(missing), []).append(claim.id)
            else:
                decides.append(claim.id)
        needs = "; ".join(f"{roles} for {' '.join(ids)}" for roles, ids in waits.items())
        rows.append({"notebook": notebook, "claims": " ".join(decides) or "-", "lacks": needs})
    table(rows)
    trained = recipes()
    for role in (name for name in [*trained, *sorted(lacking - set(trained))] if not suite.has(name)):
        print(f"role {role} is not there: {how_to_build(suite, role)}")


def _notebooks() -> list[str]:
    try:
        folder = paths.root() / "notebooks"
    except InputError:
        return []
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*.ipynb"))


def claims() -> list[Claim]:
    """Every claim of the project; none outside a project."""
    try:
        folder = paths.root() / "book" / "claims"
    except InputError:
        return []
    return every_claim(folder)
