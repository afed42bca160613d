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
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from companion import figuredata, folders, runner
from companion.scorecard import read_record
from rim_core import __version__, locks, paths
from rim_core.errors import InputError, RimError

DESCRIPTOR = "ro-crate-metadata.json"
CLAIMS = "claims.json"
_SPECIFICATION = "https://w3id.org/ro/crate/1.1"
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

    Equal results give equal crates. Raises InputError where there is nothing to pack or where `target` holds
    something already, and RimError where it cannot be written.
    """
    target = target.expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target}: there is something already; name a new folder, or an empty one")
    runs = _runs(project, suites)
    try:
        _remove_left(target)
        with folders.temporary(target) as folder:
            _fill(folder, project, runs)
            folder.rename(target)
    except OSError as error:
        raise RimError(f"cannot write the crate {target}: {error.strerror or error}") from None
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


def _remove_left(target: Path) -> None:
    """Remove what an export to `target` that was killed left beside it."""
    start = f".tmp-{locks.here()}-"
    for path in target.parent.glob(".tmp-*"):
        process = path.name.removeprefix(start).split("-")[0]
        mine = path.name == f"{start}{process}-{target.name}"
        if mine and process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _fill(folder: Path, project: Path, runs: Mapping[str, list[Path]]) -> None:
    from companion.execution import scrubber

    results = paths.results_dir(project)
    rows = runner.scorecard(project, list(runs))
    _write(folder / CLAIMS, rows)
    clean = scrubber(project)
    files = [_file(folder, CLAIMS, "Every claim's outcome, for every suite in this crate")]
    graph: list[dict[str, Any]] = []
    for suite, listed in runs.items():
        with contextlib.suppress(InputError):  # results outlive a suite's file
            text = clean(paths.suite_file(suite).read_text(encoding="utf-8"))
            name = f"suites/{paths.suite_name(suite)}.yml"
            (folder / "suites").mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            files.append(_file(folder, name, f"The models of the suite {paths.suite_name(suite)}, by role"))
        for path in listed:
            inside = f"runs/{path.relative_to(results).as_posix()}"
            _copy(path, folder / inside)
            made = [_file(folder, f"{inside}/{name}", about) for name, about in _ABOUT.items()]
            made += _figures(folder, inside)
            files += made
            graph += _action(inside, json.loads((folder / inside / "run.json").read_text("utf-8")), made)
    models = {entity["@id"]: entity for entity in graph}  # runs of one suite share its models
    _write(folder / DESCRIPTOR, _description(files, list(models.values()), [paths.suite_name(s) for s in runs]))


def _copy(source: Path, target: Path) -> None:
    """Copy a result, again where a run puts another in its place meanwhile, so that the files belong together."""
    while True:
        before = (source / "run.json").read_bytes()
        target.mkdir(parents=True, exist_ok=True)
        for name in _ABOUT:
            shutil.copyfile(source / name, target / name)
        if (source / "run.json").read_bytes() == before == (target / "run.json").read_bytes():
            return


# --- figures --------------------------------------------------------------------------------------------


def _figures(folder: Path, inside: str) -> list[dict[str, Any]]:
    notebook = json.loads((folder / inside / "notebook.ipynb").read_text(encoding="utf-8"))
    made = []
    for number, spec in enumerate(figuredata.specifications(notebook), 1):
        place = folder / inside / "figures"
        place.mkdir(exist_ok=True)
        about = str(spec.get("description") or f"Figure {number}")
        _write(place / f"{number}.json", spec)
        made.append(_file(folder, f"{inside}/figures/{number}.json", about))
        if rows := figuredata.largest(spec):
            (place / f"{number}.csv").write_text(figuredata.to_csv(rows), encoding="utf-8")
            made.append(_file(folder, f"{inside}/figures/{number}.csv", f"Data of: {about}"))
    return made


# --- the description ------------------------------------------------------------------------------------


def _description(files: list[dict[str, Any]], graph: list[dict[str, Any]], suites: Sequence[str]) -> dict[str, Any]:
    actions = [entity for entity in graph if entity["@type"] == "CreateAction"]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Results of the companion for {', '.join(suites)}",
        "description": "Claims of papers on why safety training fails, checked on language models: deciding, the "
        "data of every figure, the executed notebooks, and what each run was made with.",
        # Of the results, not of the packing, so that equal results give equal crates.
        "datePublished": max(action["endTime"] for action in actions),
        "license": {"@id": _LICENCE},
        "conformsTo": {"@id": _PROFILE},
        "hasPart": [{"@id": file["@id"]} for file in files],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    descriptor = {
        "@id": DESCRIPTOR,
        "@type": "CreativeWork",
        "conformsTo": {"@id": _SPECIFICATION},
        "about": {"@id": "./"},
    }
    profile = {"@id": _PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    licence = {"@id": _LICENCE, "@type": "CreativeWork", "name": "MIT License", "url": _LICENCE}
    return {"@context": f"{_SPECIFICATION}/context", "@graph": [descriptor, root, profile, licence, *files, *graph]}


def _action(inside: str, run: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Describe a run: what ran it, on which models, when, and which files it made."""
    version = run["versions"].get("rim-core", __version__)
    software = {
        "@id": f"#rim-core-{version}",
        "@type": "SoftwareApplication",
        "name": "rim_core",
        "description": "The code that executed the notebooks",
        "softwareVersion": version,
    }
    models = [_model(run["suite"], role, about) for role, about in run.get("models", {}).items()]
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in sorted(run["parameters"].items()))
    action = {
        "@id": f"#{inside}",
        "@type": "CreateAction",
        "name": f"{run['notebook']} on {run['suite']}",
        "description": f"Device: {run['device']}. Parameters: {settings or 'none'}.",
        "identifier": f"run key {run['run_key']}",
        "startTime": _time(run["started"]),
        "endTime": _time(run["finished"]),
        "instrument": {"@id": software["@id"]},
        "object": [{"@id": model["@id"]} for model in models],
        "result": [{"@id": file["@id"]} for file in made],
    }
    return [software, *models, action]


def _model(suite: str, role: str, about: Mapping[str, Any]) -> dict[str, Any]:
    files = about.get("files", {})
    # Two runs of a suite may have had two states of a model.
    state = f"-{list(files.values())[-1][:12]}" if files else ""
    commit = {"version": about["commit"]} if "commit" in about else {}
    return {
        "@id": f"#model-{suite}-{role}{state}",
        "@type": "CreativeWork",
        "name": f"{suite}:{role}",
        "description": f"{about.get('kind', 'model')}: {about['source']}",
        "identifier": [f"{name} sha256:{digest}" for name, digest in files.items()],
        **commit,
    }


def _time(told: str) -> str:
    # The profile asks for the offset in figures.
    return told.replace("Z", "+00:00")


def _file(folder: Path, name: str, about: str) -> dict[str, Any]:
    path = folder / name
    return {
        "@id": name,
        "@type": "File",
        "name": name,
        "description": about,
        "encodingFormat": _FORMATS[path.suffix],
        "contentSize": str(os.stat(path).st_size),
    }


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
