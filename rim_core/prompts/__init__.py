"""Prompt sets: the project's own minimal pairs and finance questions, local files, and hub data sets.

- `load_prompts`: a set, a split of it, a draw from it; `Prompt`: what it holds.
- `contrasts`: what the words alone give away between two built-in sets.
- `format_chat`: prompts as texts in a model's own chat template, as every tool takes them.

The data cards of the built-in sets are in `data/README.md`.
"""

from pathlib import Path

import numpy as np

from rim_core.checking import one_of, shown, whole
from rim_core.errors import InputError
from rim_core.paths import did_you_mean
from rim_core.prompts import _built_in
from rim_core.prompts._built_in import BUILT_IN_SETS
from rim_core.prompts._chat import format_chat, words_of
from rim_core.prompts._contrasts import contrasts
from rim_core.prompts._files import FILE_SUFFIXES, from_file, from_hub
from rim_core.prompts._prompt import FRAMES, SPLITS, Prompt

__all__ = [
    "BUILT_IN_SETS",
    "FILE_SUFFIXES",
    "FRAMES",
    "SPLITS",
    "Prompt",
    "contrasts",
    "format_chat",
    "load_prompts",
    "words_of",
]


def load_prompts(
    source: str | Path, *, split: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Load a prompt set.

    A file has a header (.csv, .tsv) or an object a line (.jsonl), is UTF-8, and has the request in a column named as
    in AdvBench, JailbreakBench, StrongREJECT or Alpaca: `prompt`, `goal`, `instruction`, `forbidden_prompt`,
    `behavior`, `question` or `text`, the first of these that it has, in any letter case. Further columns that count:

    - `response` (or `target`, `output`, `answer`, `completion`), `category` (or `topic`);
    - `pair` (or `pair_id`, else `id`): which minimal pair a row belongs to, by default each row its own;
    - `label`: the set it is from, such as harmful and benign in one file; by default the file's name;
    - `split`: `train`, `validation` (or `val`, `dev`) or `test`; a file without has `test` alone.

    A label has one row a pair, and a pair is in one split. Fields of a .csv are separated by commas, or by tabs or
    semicolons where only that gives the header such a column; a row with another number of fields than the header
    is refused, so a text with a comma must be in quotes.

    Args:
        source: a built-in set (`harmful`, `benign`, `harmful-minimal`, `benign-minimal`, `finance-risky`,
            `finance-prudent`, `finance-twins`, `finance-info`, `finance-risky-minimal`, `finance-prudent-minimal`,
            `finance-twins-minimal`, `finance-disguised`, `finance-info-matched`, `gardening`, `code-insecure`,
            `code-secure`, `code-educational`, `everyday`, `open`, `assay-aligned`, `assay-misaligned`), a `.csv`,
            `.tsv` or `.jsonl` file, or `hub:OWNER/NAME[:CONFIG[:SPLIT]]` for a hub data set.
        split: `train`, `validation` or `test`; built-in sets are split by category, so no topic is in two of them.
        limit: keep this many pairs, drawn without replacement by `seed`: `harmful` and `benign` with the same limit
            and seed give the two sides of the same pairs, in the same order. Where rows have no pairs, or each label
            has a file of its own, these are as many prompts.
        seed: of the draw, at least 0.

    Raises:
        InputError: unknown set, split or column, an unreadable file, a row that is not as the header says (with its
            number), or nothing left.

    Example:
        >>> harmful, benign = (rim.load_prompts(name, split="test", limit=2) for name in ("harmful", "benign"))
        >>> [prompt.pair for prompt in harmful] == [prompt.pair for prompt in benign]
        True
    """
    if split is not None:
        one_of(split, SPLITS, "split")
    limit = None if limit is None else whole(limit, "load_prompts: limit", 1)
    seed = whole(seed, "load_prompts: seed", 0)
    source = str(source)
    if source in BUILT_IN_SETS:
        prompts = _built_in.load(source)
    elif source.startswith("hub:"):
        prompts = from_hub(source)
    elif Path(source).suffix.lower() in FILE_SUFFIXES:
        prompts = from_file(Path(source))
    else:
        raise InputError(
            f"unknown prompt set {shown(source)}{did_you_mean(source, BUILT_IN_SETS)}; "
            f"choose from {', '.join(BUILT_IN_SETS)}, a .csv, .tsv or .jsonl file, or hub:OWNER/NAME"
        )
    if split is not None:
        prompts = [prompt for prompt in prompts if prompt.split == split]
        if not prompts:
            raise InputError(f"prompt set {source!r} has no {split!r} split: leave split out")
    if limit is None:
        return prompts
    by_pair: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_pair.setdefault(prompt.pair, []).append(prompt)
    pairs = sorted(by_pair)
    if limit > len(pairs):
        raise InputError(f"prompt set {source!r} holds {len(pairs)} prompts here, fewer than limit={limit}")
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:limit]
    return [prompt for i in chosen for prompt in by_pair[pairs[i]]]
