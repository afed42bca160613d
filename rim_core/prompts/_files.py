"""Prompt sets in files and of the hub: which columns count, and what is wrong with a row."""

import contextlib
import csv
import json
import math
import os.path
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_core.checking import TwiceError, distinct_keys, shown
from rim_core.errors import InputError, first_line
from rim_core.offline import hub_asked
from rim_core.prompts._prompt import SPLITS, Prompt

# What people call the column that holds the request, and the one that holds an answer, in the
# published files of AdvBench, JailbreakBench, StrongREJECT, HarmBench, HEx-PHI and Alpaca.
_PROMPT_COLUMNS = ("prompt", "goal", "instruction", "forbidden_prompt", "behavior", "question", "text")
_RESPONSE_COLUMNS = ("response", "target", "output", "answer", "completion")
_CATEGORY_COLUMNS = ("category", "topic", "semanticcategory")
_PAIR_COLUMNS = ("pair", "pair_id", "id")
_SPLIT_WORDS = {**{split: split for split in SPLITS}, "val": "validation", "dev": "validation"}
# Of a file's suffix, in any letter case: what its fields are separated by; of .jsonl nothing.
FILE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}

# Where a row stands in its file ("row 3 (line 4)"), and what it holds.
_Row = tuple[str, dict[str, Any]]


def from_file(path: Path) -> list[Prompt]:
    if not os.path.isfile(path):
        raise InputError(f"no prompt file at {shown(str(path), 200)}: check the path")
    separator = FILE_SUFFIXES[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if separator:
                with _long_fields():
                    rows = list(_table(handle, path, separator))
            else:
                rows = list(_json_lines(handle, path))
    except UnicodeDecodeError as error:
        from_it = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "ITS-ENCODING"
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8, for example with "
            f"`iconv -f {from_it} -t utf-8`"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    return _from_rows(rows, str(path), path.stem)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let `csv` read fields of any length meanwhile; by itself it stops at 131,072 characters."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(handle: Iterable[str], path: Path, separator: str) -> Iterator[_Row]:
    """The rows of a file with a header, each with as many fields as the header."""
    lines = list(handle)
    separator = _separator(lines, separator)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for fields in reader:
            if not any(field.strip() for field in fields) and len(fields) < 2:
                continue  # a blank line
            if header is None:
                header = [name.strip() for name in fields]
                if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
                    raise InputError(f"{path} has the column {shown(twice[0])} twice: rename one of them")
                continue
            number += 1
            if len(fields) != len(header):
                hint = "; put a text that holds one in double quotes" if len(fields) > len(header) else ""
                raise InputError(
                    f"{path} row {number} (line {reader.line_num}) has {_counted(len(fields))} and the header "
                    f"{len(header)}, separated by {_SEPARATORS[separator]}{hint}"
                )
            yield f"row {number}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not a readable table: {first_line(error)}") from None


def _counted(fields: int) -> str:
    return "1 field" if fields == 1 else f"{fields} fields"


def _separator(lines: Sequence[str], usual: str) -> str:
    """What separates a file's fields: what is usual for its suffix, unless only another gives a prompt column."""
    header = next((line for line in lines if line.strip()), "")
    for separator in (usual, *(other for other in _SEPARATORS if other != usual)):
        try:
            names = next(csv.reader([header], delimiter=separator), [])
        except csv.Error:
            continue
        if {name.strip().lower() for name in names} & set(_PROMPT_COLUMNS):
            return separator
    return usual


def _json_lines(handle: Iterable[str], path: Path) -> Iterator[_Row]:
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=distinct_keys)
        except TwiceError as error:
            raise InputError(f"{path} line {number} has {error} twice: name each key once") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is not JSON ({error.msg}): one object a line is wanted") from None
        except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
            what = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
            raise InputError(f"{path} line {number} cannot be read ({what}): one object a line is wanted") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not a JSON object: one object a line is wanted")
        yield f"line {number}", row


def _from_rows(rows: Sequence[_Row], where: str, label: str) -> list[Prompt]:
    if not rows:
        raise InputError(f"{where} holds no rows: give a file with at least one prompt")
    names = _columns(rows, where)

    def column(*candidates: str) -> str | None:
        return next((names[name] for name in candidates if name in names), None)

    text = column(*_PROMPT_COLUMNS)
    if text is None:
        raise InputError(
            f"{where} has no prompt column: it has {', '.join(names.values())[:200]}; "
            f"name one of them {', '.join(_PROMPT_COLUMNS[:4])} or so"
        )
    response, category = column(*_RESPONSE_COLUMNS), column(*_CATEGORY_COLUMNS)
    pair, split, set_name, extra = column(*_PAIR_COLUMNS), column("split"), column("label"), column("input")
    prompts = []
    for number, (place, row) in enumerate(rows, 1):
        at = f"{where} {place}"
        body = _text(row, text, at)
        if not body:
            raise InputError(f"{at} has no text in column {text!r}: fill it in or remove the row")
        more = _text(row, extra, at)
        own = _text(row, set_name, at, numbers=True) or label
        if pair and not _text(row, pair, at, numbers=True):
            raise InputError(f"{at} has no {pair}: fill it in, or remove that column")
        prompts.append(
            Prompt(
                text=f"{body}\n{more}" if more else body,
                category=_text(row, category, at, numbers=True) or "none",
                pair=_text(row, pair, at, numbers=True) or f"{label}-{number:04d}",
                split=_split_of(row, split, at),
                label=own,
                response=_text(row, response, at, numbers=True, strip=False) or None,
            )
        )
    _check_pairs(prompts, [place for place, _ in rows], where)
    return prompts


def _columns(rows: Sequence[_Row], where: str) -> dict[str, str]:
    """The columns of all rows, by their names in small letters."""
    names: dict[str, str] = {}
    for key in dict.fromkeys(key for _, row in rows for key in row):
        name = str(key).strip().lower()
        if name and names.setdefault(name, key) != key:
            raise InputError(f"{where} has the columns {names[name]!r} and {key!r}: rename one of them")
    return names


def _text(row: Mapping[str, Any], column: str | None, at: str, numbers: bool = False, strip: bool = True) -> str:
    """A row's text in a column, "" where it has none; numbers and truth values are texts where `numbers`.

    Raises:
        InputError: something else stands there, or a text that cannot be written down in UTF-8.
    """
    value = None if column is None else row.get(column)
    if value is None:
        return ""
    if numbers and isinstance(value, int | float) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{at}, column {column!r}: {shown(value)} is not a text; put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{at}, column {column!r}: half of a character (a lone surrogate) stands in the text; write it anew"
        ) from None
    return value.strip() if strip else value


def _split_of(row: Mapping[str, Any], column: str | None, at: str) -> str:
    if column is None:
        return "test"
    word = _text(row, column, at)
    if word.lower() not in _SPLIT_WORDS:
        raise InputError(
            f"{at}, column {column!r}: {shown(word)} is no split; write train, validation (val, dev) or test"
        )
    return _SPLIT_WORDS[word.lower()]


def _check_pairs(prompts: Sequence[Prompt], places: Sequence[str], where: str) -> None:
    """Check that a pair has one row a label, and one split."""
    first: dict[tuple[str, str], str] = {}
    splits: dict[str, tuple[str, str]] = {}
    for prompt, place in zip(prompts, places, strict=True):
        before = first.setdefault((prompt.label, prompt.pair), place)
        if before != place:
            raise InputError(
                f"{where}: {before} and {place} are both pair {shown(prompt.pair)} of {shown(prompt.label)}; give each "
                "row of a label a pair of its own"
            )
        split, seen = splits.setdefault(prompt.pair, (prompt.split, place))
        if split != prompt.split:
            raise InputError(
                f"{where}: pair {shown(prompt.pair)} is in split {split} ({seen}) and in {prompt.split} ({place}); "
                "keep a pair in one split"
            )


def from_hub(source: str) -> list[Prompt]:
    name, *rest = source.removeprefix("hub:").split(":")
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else None
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source} needs the package `datasets`: pip install 'rim-core[hub]'") from None
    try:
        with hub_asked():
            found = load_dataset(name, config, split=split)
    except Exception as error:  # every cause (gated, offline, misspelt, several configs) reaches the user as its text
        raise InputError(f"cannot load {source}: {first_line(error)}") from None
    if hasattr(found, "keys"):
        if len(found) > 1:
            raise InputError(f"{source} has the splits {', '.join(found)}: name one, as hub:{name}:CONFIG:SPLIT")
        found = next(iter(found.values()))
    rows = [(f"row {number}", row) for number, row in enumerate(found.to_list(), 1)]
    return _from_rows(rows, source, name.rsplit("/", 1)[-1])
