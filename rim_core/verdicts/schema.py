"""The papers' claims as data: one YAML file a paper in `book/claims/`, read into types.

Every rule is one of the types here, told apart by its `kind`. What an outcome rests on is in a claim's `rule`,
`controls`, `min_seeds` and `metric.bounds`; all else is told to readers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rim_core import paths, yamlfile
from rim_core.errors import InputError
from rim_core.yamlfile import Entry, Number, Text, Truth, Whole, mistake


def _in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("two numbers [low, high] are needed, the first less than the second")
    return bounds


def _of_a_section(name: str) -> str:
    if not re.fullmatch(r"[\w-]+/[\w-]+", name):
        raise ValueError(f"{name!r} is not of the form section/name")
    return name


def _distinct(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(what)


Bounds = Annotated[tuple[Number, Number], AfterValidator(_in_order)]
Margin = Annotated[Number, Field(ge=0)]


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
    tolerance: Margin


class ShareOfLayers(Entry):
    """The share of layers, 0 to 1, is at least `low`."""

    kind: Literal["share_of_layers"]
    low: Number


class Order(Entry):
    """Each of the numbers named is above the one before it by at least `margin`, seed by seed."""

    kind: Literal["order"]
    order: Annotated[tuple[str, ...], Field(min_length=2)]
    margin: Margin = 0.0

    @model_validator(mode="after")
    def _of_different_names(self) -> Self:
        _distinct(self.order, "order: two or more different names are needed")
        return self


class BetterThanControl(Entry):
    """The value is above the control's by at least `margin`, seed by seed."""

    kind: Literal["better_than_control"]
    control: str
    margin: Margin


Simple = Annotated[Range | Sign | Near | ShareOfLayers | Order | BetterThanControl, Field(discriminator="kind")]
OfAControl = Annotated[Range | Sign | Near | ShareOfLayers, Field(discriminator="kind")]


class Part(Entry):
    """One number of a claim that has several, by its own rule."""

    metric: Text
    rule: Simple
    bounds: Bounds | None = None


class All(Entry):
    """Every part holds."""

    kind: Literal["all"]
    parts: Annotated[tuple[Part, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _of_different_metrics(self) -> Self:
        _distinct([part.metric for part in self.parts], "parts: two have the same metric")
        return self


Rule = Annotated[Range | Sign | Near | ShareOfLayers | Order | BetterThanControl | All, Field(discriminator="kind")]


class Published(Entry):
    """What the paper reports: a number, or null, and its own words."""

    value: Number | None
    text: str = ""


class Metric(Entry):
    """What is measured, in which unit and by which notebook; `bounds` are what it can be at all."""

    name: Text
    unit: str
    notebook: Annotated[str, AfterValidator(_of_a_section)]
    bounds: Bounds | None = None
    units: Mapping[str, str] = {}


class Control(Entry):
    """A number that must be as its rule says, or the claim is undecided; `why` says what it shows.

    One that the claim's rule compares with needs no rule of its own.
    """

    name: Text
    why: str
    rule: OfAControl | None = None

    @property
    def title(self) -> str:
        """Its name as a reader sees it."""
        return self.name.replace("_", " ")


class Applies(Entry):
    """Which roles a suite needs for a claim to be decided."""

    roles: tuple[str, ...] = ()


class Claim(Entry):
    """One claim of one paper, as its file states it; `paper` is the file's."""

    _given: ClassVar[frozenset[str]] = frozenset({"paper"})

    id: Text
    statement: Text
    where: Text
    published: Published
    metric: Metric
    rule: Rule
    controls: tuple[Control, ...] = ()
    applies_to: Applies = Applies()
    min_seeds: Annotated[Whole, Field(ge=1)] = 3
    organism: Truth = True
    quote: str = ""
    limitations: str = ""
    paper: str = ""

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [control.name for control in self.controls]
        _distinct(names, "controls: two have the same name")
        compared = {part.rule.control for part in self.parts if isinstance(part.rule, BetterThanControl)}
        if unknown := sorted(compared - set(names)):
            raise mistake(f"{unknown[0]!r} is not among the claim's controls", "rule", "control")
        for place, control in enumerate(self.controls):
            if control.rule is None and control.name not in compared:
                raise mistake("missing", "controls", place, "rule")
        known = {*names, self.metric.name, *(part.metric for part in self.parts)}
        if extra := [name for name in self.metric.units if name not in known]:
            raise mistake(f"not a key here{paths.did_you_mean(extra[0], known)}", "metric", "units", extra[0])
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that a suite needs for it."""
        return self.applies_to.roles

    @property
    def parts(self) -> Sequence[Part]:
        """Each number that it rests on with its rule and bounds: one, or one a part of a rule `all`."""
        bounds = self.metric.bounds
        if not isinstance(self.rule, All):
            return [Part.model_construct(metric=self.metric.name, rule=self.rule, bounds=bounds)]
        return [part if part.bounds else part.with_fields(bounds=bounds) for part in self.rule.parts]

    @property
    def published_text(self) -> str:
        """What the paper reports, in its own form; empty where the claim is qualitative."""
        value = self.published.value
        return self.published.text or ("" if value is None else str(value))

    def unit_of(self, name: str) -> str:
        """The unit of a part or a control; empty where the file does not state it.

        `metric.unit` is that of the metric itself and of the paper's and the sound version of it.
        """
        own = name in (self.metric.name, "published", "sound")
        return self.metric.units.get(name) or (self.metric.unit if own else "")

    @property
    def decides(self) -> dict[str, Any]:
        """What an outcome depends on: a change in it makes a run stale, a change of wording does not."""
        return {
            "rule": self.rule.model_dump(exclude_unset=True, mode="json"),
            "controls": [c.model_dump(exclude_unset=True, mode="json", exclude={"why"}) for c in self.controls],
            "min_seeds": self.min_seeds,
            "bounds": self.metric.bounds,
        }


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
