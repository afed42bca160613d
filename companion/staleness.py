"""What there is to run, and what of it is stale.

`plan` makes a `Job` of each notebook. Its run key is a hash of everything the result depends on, and of nothing else,
so what is up to date is never run again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion import folders, notebooks
from rim_core import identity, paths
from rim_core.errors import InputError
from rim_core.handed import READS
from rim_core.identity import digest
from rim_core.suites.schema import Suite, load_suite, suite_hashes
from rim_core.verdicts.schema import every_claim


@dataclass(frozen=True)
class Job:
    """One notebook to be run on one suite with one set of parameters, and all that its result depends on.

    Attributes:
        project: the folder that it belongs to.
        notebook: its name, `section/name`.
        source: the notebook as it was read: what is executed is what the key was made of.
        suite: as read from its file.
        ref: the suite as the notebook, which runs in the project's folder, finds it: its name or its file's path.
        parameters: every parameter's value.
        overrides: those that are not the notebook's own; they name the result's folder.
        lacking: roles that the suite lacks, where no claim of the notebook can be decided without them.
        models: what identifies the model of each role.
        parts: SHA-256 in hex of each thing that the result depends on, and of nothing else (see `identity`).
        needs: the jobs of the notebooks that this one reads from, at their own parameters (see `handed`).
    """

    project: Path
    notebook: str
    source: Mapping[str, Any]
    suite: Suite
    ref: str
    parameters: Mapping[str, Any]
    overrides: Mapping[str, Any]
    lacking: Sequence[str]
    models: Mapping[str, str]
    parts: Mapping[str, str]
    needs: Sequence["Job"] = ()

    @property
    def key(self) -> str:
        """The run key: a hash of all `parts`."""
        return digest(self.parts)

    @property
    def variant(self) -> str:
        """The folder's name: "default", or "p-" and 8 hex digits of the sorted overrides."""
        return f"p-{digest(self.overrides)[:8]}" if self.overrides else "default"

    @property
    def folder(self) -> Path:
        """The folder that the result is put into."""
        return paths.results_dir(self.project) / self.suite.name / self.notebook / self.variant

    @property
    def state(self) -> str:
        """How its last run stands: "up to date", "stale", "failed", or without one "not run" or "not applicable"."""
        if folders.failed(self.folder).is_dir():
            return "failed"
        record = folders.read_record(self.folder / "run.json")
        if record is None:
            return "not applicable" if self.lacking else "not run"
        whole = all((self.folder / name).is_file() for name in ("notebook.ipynb", "claims.json"))
        return "up to date" if whole and record["run_key"] == self.key else "stale"

    @property
    def status(self) -> str:
        """What a run would make of it: "to run", "up to date" or "not applicable"."""
        if self.lacking:
            return "not applicable"
        return "up to date" if self.state == "up to date" else "to run"

    def row(self) -> dict[str, Any]:
        """The job as `rim run --plan` tells it, as JSON data."""
        told = {name: getattr(self, name) for name in ("notebook", "variant", "overrides", "status")}
        needs = [job.notebook for job in self.needs]
        return {**told, "suite": self.suite.name, "run_key": self.key, "needs": needs}


def with_needed(jobs: Sequence[Job]) -> list[Job]:
    """The jobs and those that they need, each once and after all that it needs."""
    ordered: dict[Path, Job] = {}
    for job in jobs:
        for each in (*with_needed(job.needs), job):
            ordered.setdefault(each.folder, each)
    return list(ordered.values())


def plan(
    names: Sequence[str],
    suite: str = paths.DEFAULT_SUITE,
    overrides: Mapping[str, Any] | None = None,
    *,
    project: Path | None = None,
) -> list[Job]:
    """Make a job of each notebook named (see `notebooks.resolve`; none means all); no model is loaded.

    Args:
        names: sections, notebooks or paths of them.
        suite: a suite's name, or the path of its file.
        overrides: parameters' values; texts are converted to each parameter's type.
        project: by default that of the working directory.

    Raises:
        InputError: a suite, a notebook, a parameter or a value that is not usable.
    """
    project = project or paths.root()
    read = load_suite(suite)
    shared = {"rim_core": identity.science(), "libraries": digest(dict(identity.libraries()))}
    models = suite_hashes(read)
    every = every_claim(project / "book" / "claims")
    plain: dict[str, Job] = {}

    def made(name: str, given: Mapping[str, Any], path: tuple[str, ...]) -> Job:
        """The job of a notebook, which those in `path` need."""
        if name in path:
            raise InputError(
                f"{name} reads from itself, by way of {', '.join(path[path.index(name) + 1 :]) or 'itself'}"
            )
        if not given and name in plain:
            return plain[name]
        source = notebooks.read_source(project, name)
        known = notebooks.parameters(name, source)
        changed = _overrides(project, name, known, given)
        parameters = {name: parameter.default for name, parameter in known.items()} | changed
        if "suite" in known:
            parameters["suite"] = read.name
        claims = [claim for claim in every if claim.notebook == name]
        missing = [[role for role in claim.roles if not read.has(role)] for claim in claims]
        parts = {
            "notebook": digest([_normalised(cell) for cell in source["cells"]]),
            "parameters": digest(_by_content(project, parameters)),
            **shared,
            "models": digest(models),
            # The rules, not their wording.
            "claims": digest([[claim.id, claim.decides] for claim in claims]),
        }
        needed = [made(other, {}, (*path, name)) for other in _read_from(project, name, source)]
        if needed:
            parts["handed on"] = digest({job.notebook: job.key for job in needed})
        lacks = missing[0] if missing and all(missing) else []
        ref = _for_kernel(project, suite)
        job = Job(project, name, source, read, ref, parameters, changed, lacks, models, parts, needed)
        if not given:
            plain[name] = job
        return job

    return [made(name, overrides or {}, ()) for name in notebooks.resolve(project, names)]


def _read_from(project: Path, name: str, source: Mapping[str, Any]) -> list[str]:
    """The notebooks whose selections a notebook reads, in the order of its source."""
    code = [notebooks.source_of(cell) for cell in source["cells"] if cell.get("cell_type") == "code"]
    found = list(dict.fromkeys(other for cell in code for other in READS.findall(cell)))
    for other in found:
        if not (project / "notebooks" / f"{other}.ipynb").is_file():
            raise InputError(f"{name} reads what {other} hands on, and there is no such notebook")
    return found


def _overrides(
    project: Path, name: str, known: Mapping[str, notebooks.Parameter], given: Mapping[str, Any]
) -> dict[str, Any]:
    if not paths.remote_asked():
        return notebooks.check_overrides(name, known, given, project)
    # Nothing is packed there. The mark keeps results and run keys apart from those of this machine.
    unpacked = {"quantization": "none"} if "quantization" in known else {}
    return {**notebooks.check_overrides(name, known, {**unpacked, **given}, project), "remote": "NDIF"}


def _by_content(project: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the content of each file that one names in place of its path."""
    files = notebooks.files_of(parameters, project)

    def content(place: str, text: str) -> str:
        return identity.file_hash(files[place]) if place in files else text

    return {name: notebooks.with_texts(name, value, content) for name, value in parameters.items()}


def _normalised(cell: Mapping[str, Any]) -> list[Any]:
    """What of a cell can change a result: neither outputs nor its identifier."""
    tags = sorted(cell.get("metadata", {}).get("tags", []))
    return [cell.get("cell_type"), notebooks.source_of(cell), tags]


def _for_kernel(project: Path, suite: str) -> str:
    if suite in paths.suite_names():
        return suite
    path = paths.suite_file(suite)
    return path.relative_to(project).as_posix() if path.is_relative_to(project) else str(path)
