"""Results as a Research Object Crate: claims, figures' data, executed notebooks, and where it all came from.

The layout is RO-Crate 1.1 with each run as an action, after the profile Process Run Crate:

    ro-crate-metadata.json   what each file is, and the run that made it
    claims.json              every claim's outcome for every suite, as `rim claims --json` tells it
    suites/SUITE.yml         the models, as they were named
    runs/SUITE/SECTION/NOTEBOOK/VARIANT/
        notebook.ipynb run.json claims.json
        figures/1.csv 1.json the data of the first figure, and all of it as Vega-Lite with its description
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from rocrate.model import ContextEntity, SoftwareApplication
from rocrate.rocrate import ROCrate

from companion.execution import scrubber
from companion.folders import read_record
from companion.outcomes import scorecard
from rim_core import __version__, paths
from rim_core.errors import InputError

_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_LICENCE = "https://spdx.org/licenses/MIT"
_FORMATS = {
    ".csv": "text/csv",
    ".ipynb": "application/x-ipynb+json",
    ".json": "application/json",
    ".yml": "application/yaml",
}
_ABOUT = {
    "notebook.ipynb": "The notebook as it was executed",
    "run.json": "Run key, models by hash, package versions, device, seeds, time and memory of the run",
    "claims.json": "The claims that the run decided, with their values by seed",
}


def export(project: Path, target: Path, suites: Sequence[str] | None = None) -> Path:
    """Write the results of some suites, or of all that have some, as a crate to the folder `target`, whole or not.

    Equal results give equal crates. Raises InputError where there is nothing to pack, where `target` holds something
    already, and where it cannot be written.
    """
    target = target.expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target}: there is something already; name a new folder, or an empty one")
    runs = _runs(project, suites)
    crate = _crate(project, runs)
    with paths.put_whole(target) as folder:
        crate.write(folder)
    return target


def _runs(project: Path, suites: Sequence[str] | None) -> dict[str, list[Path]]:
    """Find the finished runs of each suite, which is named as it was given."""
    results = paths.results_dir(project)
    found = {}
    for suite in suites or sorted(path.name for path in results.glob("*") if path.is_dir()):
        folder = results / paths.suite_name(suite)
        runs = sorted(path.parent for path in folder.glob("*/*/*/run.json"))
        found[suite] = [run for run in runs if not run.name.startswith(".") and read_record(run / "run.json")]
        if suites and not found[suite]:
            paths.suite_file(suite)
            raise InputError(f"suite {folder.name} has no results to export; rim run --suite {suite}")
    found = {suite: runs for suite, runs in found.items() if runs}
    if not found:
        raise InputError("there are no results to export yet; rim run")
    return found


def _crate(project: Path, runs: Mapping[str, list[Path]]) -> ROCrate:
    crate = ROCrate(version="1.1")
    names = [paths.suite_name(suite) for suite in runs]
    crate.name = f"Results of the companion for {', '.join(names)}"
    crate.description = (
        "Claims of papers on why safety training fails, checked on language models: outcomes, the data of every "
        "figure, the executed notebooks, and what each run was made with."
    )
    licence = {"@type": "CreativeWork", "name": "MIT License", "url": _LICENCE}
    profile = {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    crate.license = crate.add(ContextEntity(crate, _LICENCE, licence))
    crate.root_dataset["conformsTo"] = crate.add(ContextEntity(crate, _PROFILE, profile))
    _add(
        crate,
        "claims.json",
        _json(scorecard(project, list(runs))),
        "Every claim's outcome, for every suite in this crate",
    )
    clean, actions = scrubber(project), []
    for suite, folders in runs.items():
        with contextlib.suppress(InputError):  # results outlive a suite's file
            text = clean(paths.suite_file(suite).read_text(encoding="utf-8")).encode()
            name = paths.suite_name(suite)
            _add(crate, f"suites/{name}.yml", text, f"The models of the suite {name}, by role")
        for folder in folders:
            inside = folder.relative_to(paths.results_dir(project)).as_posix()
            actions.append(_add_run(crate, folder, f"runs/{inside}"))
    crate.root_dataset["mentions"] = actions
    # Of the results, not of the packing, so that equal results give equal crates.
    crate.datePublished = max(action["endTime"] for action in actions)
    return crate


def _add(crate: ROCrate, name: str, content: bytes, about: str) -> Any:
    told = {"name": name, "description": about, "encodingFormat": _FORMATS[Path(name).suffix]}
    return crate.add_file(BytesIO(content), name, properties={**told, "contentSize": str(len(content))})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _add_run(crate: ROCrate, folder: Path, inside: str) -> Any:
    """Add a run's files, its figures, and the action that made them: what ran on which models, and when."""
    files = _read(folder)
    made = [_add(crate, f"{inside}/{name}", files[name], about) for name, about in _ABOUT.items()]
    for number, spec in enumerate(_figures(json.loads(files["notebook.ipynb"])), 1):
        about = str(spec.get("description") or f"Figure {number}")
        made.append(_add(crate, f"{inside}/figures/{number}.json", _json(spec), about))
        if rows := _largest(spec):
            table = pd.DataFrame(rows, dtype=object).to_csv(index=False).encode()
            made.append(_add(crate, f"{inside}/figures/{number}.csv", table, f"Data of: {about}"))
    run = json.loads(files["run.json"])
    version = run["versions"].get("rim-core", __version__)
    software = {"name": "rim_core", "description": "The code that executed the notebooks", "softwareVersion": version}
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in sorted(run["parameters"].items()))
    return crate.add_action(
        crate.add(SoftwareApplication(crate, f"#rim-core-{version}", software)),
        identifier=f"#{inside}",
        object=[_model(crate, run["suite"], role, about) for role, about in run.get("models", {}).items()],
        result=made,
        properties={
            "name": f"{run['notebook']} on {run['suite']}",
            "description": f"Device: {run['device']}. Parameters: {settings or 'none'}.",
            "identifier": f"run key {run['run_key']}",
            "startTime": _time(run["started"]),
            "endTime": _time(run["finished"]),
        },
    )


def _read(folder: Path) -> dict[str, bytes]:
    """Read a result, again where a run puts another in its place meanwhile, so that the files belong together."""
    while True:
        files = {name: (folder / name).read_bytes() for name in _ABOUT}
        if (folder / "run.json").read_bytes() == files["run.json"]:
            return files


def _model(crate: ROCrate, suite: str, role: str, about: Mapping[str, Any]) -> Any:
    files = about.get("files", {})
    # Two runs of a suite may have had two states of a model.
    state = f"-{list(files.values())[-1][:12]}" if files else ""
    told = {
        "@type": "CreativeWork",
        "name": f"{suite}:{role}",
        "description": f"{about.get('kind', 'model')}: {about['source']}",
        "identifier": [f"{name} sha256:{digest}" for name, digest in files.items()],
        **({"version": about["commit"]} if "commit" in about else {}),
    }
    return crate.add(ContextEntity(crate, f"#model-{suite}-{role}{state}", told))


def _time(told: str) -> str:
    # The profile asks for the offset in figures.
    return told.replace("Z", "+00:00")


def _figures(notebook: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the Vega-Lite specification of each chart that a notebook shows, in order."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if kind.startswith("application/vnd.vegalite.") and isinstance(value, dict):
                    yield value


def _largest(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the rows of a chart's largest data set; others are such as a line of reference."""
    own = spec.get("data") or {}
    sets = [*spec.get("datasets", {}).values(), own.get("values", [])]
    return max((rows for rows in sets if isinstance(rows, list)), key=len, default=[])
