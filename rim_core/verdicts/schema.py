"""The papers' claims as data: one YAML file a paper in `book/claims/`, read into types.

A claim is a conjunction of `parts`, each a number with its rule, in two versions: as the paper did it, and sound. Its
`checks` are of the instrument: where one fails, nothing was measured. Every rule is one of the types here, told apart
by its `kind`. What an outcome rests on is in `Claim.decides`; all else is told to readers. A change of it goes into the
claim's `changes`.
"""

import datetime
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rim_core import paths, yamlfile
from rim_core.errors import InputError
from rim_core.identity import digest
from rim_core.yamlfile import Entry, Number, Text, Truth, Whole

Version = Literal["published", "sound"]


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("two numbers [low, high] are needed, the first less than the second")
    return bounds


def _of_a_section(name: str) -> str:
    if not re.fullmatch(r"[\w-]+/[\w-]+", name):
        raise ValueError(f"{name!r} is not of the form section/name")
    return name


Bounds = Annotated[tuple[Number, Number], AfterValidator(_in_order)]


class Range(Entry):
    """The value lies between `low` and `high`, both allowed themselves."""

    kind: Literal["range"]
    low: Number = -math.inf
    high: Number = math.inf

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.model_fields_set & {"low", "high"}:
            raise ValueError("a range needs low, high or both")
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Sign(Entry):
    """The value is above nothing, or below."""

    kind: Literal["sign"]
    sign: Literal["positive", "negative"]


class Near(Entry):
    """The value is at most `tolerance` from `target`."""

    kind: Literal["near"]
    target: Number
    tolerance: Annotated[Number, Field(ge=0)]


Rule = Annotated[Range | Sign | Near, Field(discriminator="kind")]


class Numbered(Entry):
    """A number that a claim rests on, with its rule; `bounds` are what it can be at all."""

    name: Text
    rule: Rule
    unit: str = ""
    bounds: Bounds | None = None

    @property
    def title(self) -> str:
        """Its name as a reader sees it."""
        return self.name.replace("_", " ")


class Part(Numbered):
    """What must be so if the claim is right.

    Attributes:
        version: `published`, the paper's own method; `sound`, with what the method lacks; `both`, where they are one.
    """

    version: Literal["published", "sound", "both"]


class Check(Numbered):
    """What must be so if the instrument works, whether or not the claim is right; `why` says what it shows."""

    why: Text


class Published(Entry):
    """What the paper reports: a number, or null, and its own words."""

    value: Number | None
    text: str = ""


class Applies(Entry):
    """Which roles a suite needs for a claim to be decided."""

    roles: tuple[str, ...] = ()


class Change(Entry):
    """One entry of a claim's history.

    Attributes:
        date: of the change.
        what: changed, and `why`; `seen`: which results were known by then.
        rules: `Claim.fingerprint` from then on; left out of entries that were written afterwards.
    """

    date: datetime.date
    what: Text
    why: str = ""
    seen: str = ""
    rules: str = ""


class Claim(Entry):
    """One claim of one paper, as its file states it; `paper` is the file's."""

    _given: ClassVar[frozenset[str]] = frozenset({"paper"})

    id: Text
    statement: Text
    where: Text
    published: Published
    notebook: Annotated[str, AfterValidator(_of_a_section)]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    checks: tuple[Check, ...] = ()
    applies_to: Applies = Applies()
    min_seeds: Annotated[Whole, Field(ge=1)] = 3
    organism: Truth = True
    quote: str = ""
    limitations: str = ""
    changes: tuple[Change, ...] = ()
    paper: str = ""

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        names = [number.name for number in self.numbers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two parts or checks are named {twice[0]!r}")
        return self

    @property
    def numbers(self) -> Sequence[Part | Check]:
        """Its parts, then its checks."""
        return [*self.parts, *self.checks]

    def version(self, version: Version) -> Sequence[Part]:
        """The parts that one version of the claim rests on."""
        return [part for part in self.parts if part.version in (version, "both")]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that a suite needs for it."""
        return self.applies_to.roles

    @property
    def published_text(self) -> str:
        """What the paper reports, in its own form; empty where the claim is qualitative."""
        value = self.published.value
        return self.published.text or ("" if value is None else str(value))

    @property
    def decides(self) -> dict[str, Any]:
        """What an outcome depends on: a change in it makes a run stale, a change of wording does not."""
        told = {"name", "version", "rule", "bounds"}
        return {
            "parts": [part.model_dump(exclude_unset=True, mode="json", include=told) for part in self.parts],
            "checks": [check.model_dump(exclude_unset=True, mode="json", include=told) for check in self.checks],
            "min_seeds": self.min_seeds,
        }

    @property
    def fingerprint(self) -> str:
        """Eight digits of what it `decides` by: the last of its `changes` has them."""
        return digest(self.decides)[:8]


class Paper(Entry):
    """A file of claims."""

    paper: str
    letter: str = ""
    title: str = ""
    claims: tuple[Claim, ...]


def load_paper(name: str, folder: Path | None = None) -> Paper:
    """Read `book/claims/<name>.yml`.

    Raises:
        InputError: no such paper, or a file that is none; names file, line, claim and key.
    """
    folder = folder or paths.root() / "book" / "claims"
    path = folder / f"{name}.yml"
    if not path.is_file():
        known = [p.stem for p in sorted(folder.glob("*.yml"))]
        hint = paths.did_you_mean(name, known)
        raise InputError(f"no claims for paper {name!r}{hint}; papers: {', '.join(known) or 'none'}")
    read = yamlfile.read(Paper, path)
    if read.paper != name:
        raise InputError(f"{path}: paper: must be {name!r}, the file's own name")
    ids = [claim.id for claim in read.claims]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise InputError(f"{path}: claim {twice[0]}: id: used twice; every claim needs its own")
    return read.with_fields(claims=tuple(claim.with_fields(paper=name) for claim in read.claims))


def load_claims(paper: str, folder: Path | None = None) -> tuple[Claim, ...]:
    """The claims of a paper; raises `InputError` as `load_paper` does."""
    return load_paper(paper, folder).claims


def every_paper(folder: Path) -> list[Paper]:
    """Every paper in a folder of claims, by name."""
    return [load_paper(path.stem, folder) for path in sorted(folder.glob("*.yml"))]


def every_claim(folder: Path) -> list[Claim]:
    """The claims of every paper in a folder of claims, in the order of the papers' names."""
    return [claim for paper in every_paper(folder) for claim in paper.claims]
