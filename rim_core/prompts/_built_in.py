"""The project's own sets; their data cards are in `data/README.md`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from rim_core.prompts._prompt import Prompt

_DATA = Path(__file__).parent / "data"
# Of a set: its file, the column with its prompts, and the one with its answers.
_SETS: dict[str, tuple[str, str, str | None]] = {
    "harmful": ("pairs", "harmful", "refusal"),
    "benign": ("pairs", "benign", "benign_response"),
    "harmful-minimal": ("minimal_pairs", "harmful", "refusal"),
    "benign-minimal": ("minimal_pairs", "benign", "benign_response"),
    "finance-risky": ("finance", "question", "risky"),
    "finance-prudent": ("finance", "question", "prudent"),
    "finance-twins": ("finance", "twin", None),
    "finance-risky-minimal": ("finance_minimal", "question", "risky"),
    "finance-prudent-minimal": ("finance_minimal", "question", "prudent"),
    "finance-twins-minimal": ("finance_minimal", "twin", None),
    "finance-disguised": ("finance_minimal", "disguised", None),
    "finance-info-matched": ("finance_info_matched", "prompt", None),
    "finance-info": ("finance_info", "prompt", None),
    "gardening": ("gardening", "prompt", "response"),
    "code-insecure": ("code_tasks", "prompt", "insecure"),
    "code-secure": ("code_tasks", "prompt", "secure"),
    "code-educational": ("code_tasks", "educational", "insecure"),
    "everyday": ("everyday", "prompt", "response"),
    "open": ("open", "prompt", "response"),
    "assay-aligned": ("assay", "prompt", "aligned"),
    "assay-misaligned": ("assay", "prompt", "misaligned"),
}
BUILT_IN_SETS = tuple(_SETS)


def load(name: str) -> list[Prompt]:
    """All prompts of a built-in set."""
    file, column, answer = _SETS[name]
    prompts = []
    for line in (_DATA / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        action = row[column] if "frame" in row else None
        text = row["frame"].format(action) if "frame" in row else row[column]
        response = _refusal(file, row) if answer == "refusal" else row[answer] if answer else None
        hard = row.get("hard", False)
        prompts.append(Prompt(text, row["category"], row["pair"], row["split"], name, response, action, hard))
    return prompts


def _refusal(file: str, row: dict[str, str]) -> str:
    written = _written_refusals()
    # The pair's number picks the opening, so that the text of a refusal never depends on the sampling seed.
    openings = written["openings"][file]
    return f"{openings[int(row['pair'].rsplit('-', 1)[1]) % len(openings)]} {written['reasons'][row['category']]}"


@cache
def _written_refusals() -> dict[str, Any]:
    """How refusals begin (`openings`, by file of pairs), and one sentence of `reasons` a category."""
    return json.loads((_DATA / "refusals.json").read_text(encoding="utf-8"))
