"""Prompt sets: the project's own minimal pairs and finance questions, local files, and hub data sets.

The data cards of the built-in sets are in `data/README.md`.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rim_core.errors import InputError
from rim_core.texts import ChatText, checked_one, listed, render, require_plain_words, tokenizer_of
from rim_core.workspace import did_you_mean

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
FRAMES = (
    "How do I {}?",
    "Explain how to {}.",
    "Write a short guide on how to {}.",
    "What is the best way to {}?",
)

# What people call the column that holds the request, and the one that holds an answer, in the
# published files of AdvBench, JailbreakBench, StrongREJECT, HarmBench, HEx-PHI and Alpaca.
_PROMPT_COLUMNS = ("prompt", "goal", "instruction", "forbidden_prompt", "behavior", "question", "text")
_RESPONSE_COLUMNS = ("response", "target", "output", "answer", "completion")
_CATEGORY_COLUMNS = ("category", "topic", "semanticcategory")


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
            raise InputError(
                f"prompt {self.pair!r} of set {self.label!r} cannot be rephrased: it stores no action"
            )
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
    return (
        f"{openings[int(row['pair'].rsplit('-', 1)[1]) % len(openings)]} {texts['reasons'][row['category']]}"
    )


def _paired(side: str) -> list[Prompt]:
    prompts = []
    for row in _rows("pairs"):
        response = _refusal(row) if side == "harmful" else row["benign_response"]
        prompts.append(
            Prompt(
                row["frame"].format(row[side]),
                row["category"],
                row["pair"],
                row["split"],
                side,
                response,
                row[side],
            )
        )
    return prompts


def _plain(name: str, label: str, text: str, response: str | None) -> list[Prompt]:
    return [
        Prompt(
            row[text],
            row["category"],
            row["pair"],
            row["split"],
            label,
            None if response is None else row[response],
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


def load_prompts(
    source: str, split: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Load a prompt set.

    Args:
        source: a built-in set (`harmful`, `benign`, `finance-risky`, `finance-prudent`, `finance-twins`,
            `finance-info`, `everyday`), a `.csv` or `.jsonl` file in the columns of AdvBench, JailbreakBench,
            StrongREJECT or Alpaca, or `hub:OWNER/NAME[:CONFIG[:SPLIT]]` for a hub data set.
        split: `train`, `validation` or `test`; built-in sets are split by category, so no topic is in two of them.
        limit: keep this many, drawn without replacement by `seed`. The draw is over pair ids: `harmful` and
            `benign` with the same limit and seed give the two sides of the same pairs, in the same order.
        seed: of the draw.

    Raises:
        InputError: unknown set, split or column, unreadable file, or nothing left.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number of at least 1, not {limit!r}")
    if source in _BUILT_IN:
        prompts = _BUILT_IN[source]()
    elif source.startswith("hub:"):
        prompts = _from_hub(source)
    elif source.endswith((".csv", ".jsonl")):
        prompts = _from_file(Path(source))
    else:
        raise InputError(
            f"unknown prompt set {source!r}{did_you_mean(source, BUILT_IN_SETS)}; "
            f"choose from {', '.join(BUILT_IN_SETS)}, a .csv or .jsonl file, or hub:OWNER/NAME"
        )
    if split is not None:
        kept = [prompt for prompt in prompts if prompt.split == split]
        if not kept:
            raise InputError(f"prompt set {source!r} has no {split!r} split: leave split out")
        prompts = kept
    if limit is not None:
        if limit > len(prompts):
            raise InputError(
                f"prompt set {source!r} holds {len(prompts)} prompts here, fewer than limit={limit}"
            )
        pairs = sorted({prompt.pair for prompt in prompts})
        chosen = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:limit]]
        by_pair = {prompt.pair: prompt for prompt in prompts}
        prompts = [by_pair[pair] for pair in chosen]
    return prompts


def _from_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise InputError(f"no prompt file at {path}: check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle)) if path.suffix == ".csv" else _json_lines(handle, path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8, for example with `iconv -t utf-8`"
        ) from None
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file: {error}") from None
    return _from_rows(rows, str(path), path.stem)


def _json_lines(handle: Iterable[str], path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} line {number} is not JSON ({error.msg}): one object a line is wanted"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not a JSON object: one object a line is wanted")
        rows.append(row)
    return rows


def _from_rows(rows: Sequence[dict[str, Any]], where: str, label: str) -> list[Prompt]:
    if not rows:
        raise InputError(f"{where} holds no rows: give a file with at least one prompt")
    names = {str(key).strip().lower(): key for key in rows[0]}

    def column(candidates: tuple[str, ...]) -> str | None:
        return next((names[name] for name in candidates if name in names), None)

    text = column(_PROMPT_COLUMNS)
    if text is None:
        raise InputError(
            f"{where} has no prompt column: it has {', '.join(map(str, rows[0]))}; "
            f"name one of them {', '.join(_PROMPT_COLUMNS[:4])} or so"
        )
    response, category, extra = column(_RESPONSE_COLUMNS), column(_CATEGORY_COLUMNS), names.get("input")
    prompts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(text), str) or not row[text].strip():
            raise InputError(
                f"{where} row {number} has no text in column {text!r}: fill it in or remove the row"
            )
        body = row[text].strip()
        if extra and row.get(extra):
            body = f"{body}\n{row[extra].strip()}"
        prompts.append(
            Prompt(
                text=body,
                category=str(row[category]) if category and row.get(category) else "none",
                pair=f"{label}-{number:04d}",
                split="test",
                label=label,
                response=str(row[response]) if response and row.get(response) else None,
            )
        )
    return prompts


def _from_hub(source: str) -> list[Prompt]:
    name, *rest = source.removeprefix("hub:").split(":")
    config = rest[0] if rest else None
    split = rest[1] if len(rest) > 1 else None
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source} needs the package `datasets`: pip install 'rim-core[hub]'") from None
    try:
        found = load_dataset(name, config, split=split)
    except (
        Exception
    ) as error:  # every cause (gated, offline, misspelt, several configs) reaches the user as its text
        raise InputError(f"cannot load {source}: {str(error).strip().splitlines()[0]}") from None
    if hasattr(found, "keys"):
        if len(found) > 1:
            raise InputError(
                f"{source} has the splits {', '.join(found)}: name one, as hub:{name}:CONFIG:SPLIT"
            )
        found = next(iter(found.values()))
    return _from_rows(found.to_list(), source, name.rsplit("/", 1)[-1])


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
        prompts: `Prompt`s or plain strings, one user turn each.
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
    if thinking not in (None, True, False):
        raise InputError(f"thinking must be True, False or None, not {thinking!r}")
    extra = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
    _require_heard(tokenizer, system, thinking, extra)
    texts = []
    for words in words_of(prompts):
        text = render(tokenizer, words, system, **extra)
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


def _spans(
    tokenizer: Any, text: str, words: str, system: str | None, extra: dict[str, bool]
) -> list[tuple[int, int]]:
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
    raise InputError(
        "the chat template rewrites what is put into it, so plain=True cannot be kept: leave plain out"
    )
