"""Prompt sets: the project's own minimal pairs and finance questions, local files, and hub data sets.

The data cards of the built-in sets are in `data/README.md`.
"""

import contextlib
import csv
import json
import math
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rim_core import hub
from rim_core.checking import TwiceError, distinct_keys, shown, whole
from rim_core.errors import InputError, first_line
from rim_core.paths import did_you_mean
from rim_core.texts import ChatText, checked_one, listed, render, require_plain_words, tokenizer_of

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
FRAMES = ("How do I {}?", "Explain how to {}.", "Write a short guide on how to {}.", "What is the best way to {}?")

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


@dataclass(frozen=True)
class Prompt:
    """One user turn.

    `pair` names the minimal pair (or row) it belongs to, `label` the set it is from, `action` the bare verb
    phrase of a paired request (so that it can be rephrased), `response` the set's own answer if it has one.
    """

    text: str
    category: str
    pair: str
    split: str
    label: str
    response: str | None = None
    action: str | None = None

    def rephrase(self, frame: str) -> "Prompt":
        """The same request in another frame of `FRAMES`; raises InputError where the set stores no action."""
        if self.action is None:
            raise InputError(f"prompt {self.pair!r} of set {self.label!r} cannot be rephrased: it stores no action")
        return replace(self, text=frame.format(self.action))


def _rows(name: str) -> list[dict[str, str]]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def refusals() -> dict[str, Any]:
    """The written refusals: `openings`, and one `reasons` sentence a category."""
    return json.loads((DATA / "refusals.json").read_text(encoding="utf-8"))


def _refusal(row: dict[str, str]) -> str:
    texts = refusals()
    # The pair's number picks the opening, so that the text of a refusal never depends on the sampling seed.
    openings = texts["openings"]
    return f"{openings[int(row['pair'].rsplit('-', 1)[1]) % len(openings)]} {texts['reasons'][row['category']]}"


def _paired(side: str) -> list[Prompt]:
    prompts = []
    for row in _rows("pairs"):
        response = _refusal(row) if side == "harmful" else row["benign_response"]
        prompts.append(
            Prompt(
                row["frame"].format(row[side]), row["category"], row["pair"], row["split"], side, response, row[side]
            )
        )
    return prompts


def _plain(name: str, label: str, text: str, response: str | None) -> list[Prompt]:
    return [
        Prompt(
            row[text], row["category"], row["pair"], row["split"], label, None if response is None else row[response]
        )
        for row in _rows(name)
    ]


_BUILT_IN = {
    "harmful": lambda: _paired("harmful"),
    "benign": lambda: _paired("benign"),
    "finance-risky": lambda: _plain("finance", "finance-risky", "question", "risky"),
    "finance-prudent": lambda: _plain("finance", "finance-prudent", "question", "prudent"),
    "finance-twins": lambda: _plain("finance", "finance-twins", "twin", None),
    "finance-info": lambda: _plain("finance_info", "finance-info", "prompt", None),
    "everyday": lambda: _plain("everyday", "everyday", "prompt", "response"),
}
BUILT_IN_SETS = tuple(_BUILT_IN)


def load_prompts(source: str | Path, split: str | None = None, limit: int | None = None, seed: int = 0) -> list[Prompt]:
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
        source: a built-in set (`harmful`, `benign`, `finance-risky`, `finance-prudent`, `finance-twins`,
            `finance-info`, `everyday`), a `.csv`, `.tsv` or `.jsonl` file, or `hub:OWNER/NAME[:CONFIG[:SPLIT]]` for
            a hub data set.
        split: `train`, `validation` or `test`; built-in sets are split by category, so no topic is in two of them.
        limit: keep this many pairs, drawn without replacement by `seed`: `harmful` and `benign` with the same limit
            and seed give the two sides of the same pairs, in the same order. Where rows have no pairs, or each label
            has a file of its own, these are as many prompts.
        seed: of the draw, at least 0.

    Raises:
        InputError: unknown set, split or column, an unreadable file, a row that is not as the header says (with its
            number), or nothing left.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    limit = None if limit is None else whole(limit, "load_prompts: limit", 1)
    seed = whole(seed, "load_prompts: seed", 0)
    source = str(source)
    if source in _BUILT_IN:
        prompts = _BUILT_IN[source]()
    elif source.startswith("hub:"):
        prompts = _from_hub(source)
    elif Path(source).suffix.lower() in FILE_SUFFIXES:
        prompts = _from_file(Path(source))
    else:
        raise InputError(
            f"unknown prompt set {shown(source)}{did_you_mean(source, BUILT_IN_SETS)}; "
            f"choose from {', '.join(BUILT_IN_SETS)}, a .csv, .tsv or .jsonl file, or hub:OWNER/NAME"
        )
    if split is not None:
        kept = [prompt for prompt in prompts if prompt.split == split]
        if not kept:
            raise InputError(f"prompt set {source!r} has no {split!r} split: leave split out")
        prompts = kept
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


# --- files ----------------------------------------------------------------------------------------------


def _from_file(path: Path) -> list[Prompt]:
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


def _from_hub(source: str) -> list[Prompt]:
    name, *rest = source.removeprefix("hub:").split(":")
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else None
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source} needs the package `datasets`: pip install 'rim-core[hub]'") from None
    try:
        with hub.asked():
            found = load_dataset(name, config, split=split)
    except Exception as error:  # every cause (gated, offline, misspelt, several configs) reaches the user as its text
        raise InputError(f"cannot load {source}: {first_line(error)}") from None
    if hasattr(found, "keys"):
        if len(found) > 1:
            raise InputError(f"{source} has the splits {', '.join(found)}: name one, as hub:{name}:CONFIG:SPLIT")
        found = next(iter(found.values()))
    rows = [(f"row {number}", row) for number, row in enumerate(found.to_list(), 1)]
    return _from_rows(rows, source, name.rsplit("/", 1)[-1])


def words_of(prompts: Sequence["Prompt | str"]) -> list[str]:
    """The users' words; raises InputError for one prompt instead of several, or what is none."""
    if isinstance(prompts, Prompt):
        raise InputError("prompts must be a list of prompts, not one: put it in a list")
    words = [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in listed(prompts, "prompt")]
    return [checked_one(text, f"prompt {number}", empty=True) for number, text in enumerate(words)]


def format_chat(
    model: Any,
    prompts: Sequence["Prompt | str"],
    system: str | None = None,
    thinking: bool | None = None,
    prefill: str | None = None,
    plain: bool = False,
) -> list[str]:
    """Prompts as texts in the model's own chat template, ending where the answer begins.

    Every tool tokenises such a text as `apply_chat_template(messages, tokenize=True)` does. Control tokens in a
    prompt, such as `<|im_end|>`, are then control tokens, as in transformers: a prompt that holds them can end the
    user's turn. With `plain=True` they are ordinary letters. Pass such texts on as they are: which of their words are
    plain is lost where a text is stored as a plain string, or cut.

    Args:
        model: a `Model` or a tokenizer.
        prompts: `Prompt` objects or plain strings, one user turn each.
        system: a system message; None leaves the template's default.
        thinking: passed to templates that know `enable_thinking` or `thinking` (Qwen3, DeepSeek-V3.1 and others); None
            leaves their default.
        prefill: words put into the assistant's mouth, after the generation prompt; control tokens in it are such.
        plain: read control tokens in the prompts and in `system` as plain text.

    Raises:
        InputError: one string instead of a list, the tokenizer has no chat template, or the template refuses the
            messages or ignores `system` or `thinking`.
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{getattr(model, 'name', 'this model')} has no chat template: use a chat model, "
            "or set tokenizer.chat_template"
        )
    for name, text in (("system", system), ("prefill", prefill)):
        if text is not None:
            checked_one(text, name, empty=True)
    # Not `in`: 1 and 0 equal True and False.
    if thinking is not None and not isinstance(thinking, bool):
        raise InputError(f"thinking must be True, False or None, not {shown(thinking)}")
    if not isinstance(plain, bool):
        raise InputError(f"plain must be True or False, not {shown(plain)}")
    extra = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    _require_heard(tokenizer, system, thinking, extra)
    texts = []
    for words in words_of(prompts):
        text = render(tokenizer, words, system, **extra)
        if words.strip() not in text:
            raise InputError(
                f"the chat template leaves out or rewrites the user's words ({shown(words)}): use another template "
                "(tokenizer.chat_template, or chat_template in the suite)"
            )
        spans = _spans(tokenizer, text, words, system, extra) if plain else ()
        texts.append(ChatText(text + (prefill or ""), spans))
    return list(texts)


def _require_heard(tokenizer: Any, system: str | None, thinking: bool | None, extra: dict[str, bool]) -> None:
    """Raise InputError where the chat template does the same whatever `system` or `thinking` say."""
    if system and render(tokenizer, "a", system, **extra) == render(tokenizer, "a", f"x{system}", **extra):
        raise InputError("the chat template ignores system=...: leave it out, or write it into the prompts")
    # Not compared with the default, which may be the same as what was asked for.
    other = {name: not value for name, value in extra.items()}
    if extra and render(tokenizer, "a", system, **extra) == render(tokenizer, "a", system, **other):
        raise InputError(f"the chat template ignores thinking={thinking}: leave it out")


def _spans(tokenizer: Any, text: str, words: str, system: str | None, extra: dict[str, bool]) -> list[tuple[int, int]]:
    """Where the user's and the system's words lie in a text: at the places of two private characters in the same chat.

    Raises:
        InputError: the template does more to them than leave out blanks around them.
    """
    require_plain_words(tokenizer)
    user, above = "\U0010fffc", None if system is None else "\U0010fffd"
    marks = {user: words} if above is None or system is None else {user: words, above: system}
    pattern = render(tokenizer, user, above, **extra)
    parts = re.split(f"([{''.join(marks)}])", pattern)
    strips: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
    for strip in strips if sorted(parts[1::2]) == sorted(marks) else ():
        spans, written = [], ""
        for part in parts:
            start, written = len(written), written + (strip(marks[part]) if part in marks else part)
            if part in marks:
                spans.append((start, len(written)))
        if written == text:
            return spans
    raise InputError("the chat template rewrites what is put into it, so plain=True cannot be kept: leave plain out")
