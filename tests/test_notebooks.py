"""The notebooks: clean, typed, role-asking, and at reduced size run through the real runner to real claims."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from companion import outcomes
from rim_core.paths import suite_names
from rim_core.verdicts.schema import load_claims

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_sources_are_clean_and_readable_alone(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    lines = parameters[0].source.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            assert ":" in line.split("=")[0], f"untyped parameter: {line}"
            assert lines[number - 1].startswith("#"), f"parameter without a comment: {line}"
    assert notebook.cells[0].source.startswith("# ")
    text = "".join(cell.source for cell in code if cell is not parameters[0])
    assert not [name for name in suite_names() if f'"{name}' in text], "ask the suite for roles, not for a model"


def test_reduced_run_decides_every_claim_of_its_notebook(reduced_project):
    results = reduced_project / "results" / "smollm2"
    for path in NOTEBOOKS:
        name = f"{path.parent.name}/{path.stem}"
        folder = results / name / "default"
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "ok"
        found = {claim["claim_id"]: claim for claim in json.loads((folder / "claims.json").read_text())}
        wanted = [
            c.id for c in load_claims(path.parent.name, reduced_project / "book" / "claims") if c.notebook == name
        ]
        assert set(wanted) <= set(found)
        for claim in found.values():
            assert claim["outcome"] not in ("error", "not_tested"), claim


@pytest.mark.parametrize(("bound", "outcome"), [(-1e9, "holds"), (1e9, "contradicted")])
def test_a_changed_bound_changes_the_outcome(reduced_project, tmp_path, monkeypatch, bound, outcome):
    """The same recorded values, other rules: no outcome is written by hand."""
    claims = yaml.safe_load((reduced_project / "book" / "claims" / "self_aware.yml").read_text(encoding="utf-8"))
    for claim in claims["claims"]:
        for check in claim.get("checks", []):
            check["rule"] = {"kind": "range", "low": -1e9}
        for part in claim["parts"]:
            part.pop("bounds", None)
            part["rule"] = {"kind": "range", "low": bound}
    (tmp_path / "book" / "claims").mkdir(parents=True)
    (tmp_path / "book" / "claims" / "self_aware.yml").write_text(yaml.safe_dump(claims), encoding="utf-8")
    (tmp_path / "results").symlink_to(reduced_project / "results")
    monkeypatch.chdir(reduced_project)
    rows = outcomes.rows(tmp_path / "results", ["smollm2"])
    assert [row["claim"] for row in rows] == [f"C{n}" for n in range(1, 18)]
    # Where all seeds of so small a run give the same value, no bound decides.
    known = [row for row in rows if outcome == "contradicted" or "so it has no interval" not in row["reason"]]
    assert len(known) > 12
    assert {row["outcome"] for row in known} == {outcome}, [row["reason"] for row in known]


def test_the_scorecard_has_every_claim(reduced_project, monkeypatch):
    monkeypatch.chdir(reduced_project)
    rows = outcomes.rows(reduced_project / "results", ["smollm2"])
    numbered = {"D": 8, "N": 3, "C": 17, "S": 9}
    every = [f"{letter}{number}" for letter, last in numbered.items() for number in range(1, last + 1)]
    assert [row["claim"] for row in rows] == every
    assert all(row["run_key"] for row in rows)
