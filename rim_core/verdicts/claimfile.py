"""The papers' claims as data: one YAML file a paper in `book/claims/`, read and checked key by key."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rim_core import paths
from rim_core.errors import InputError

_RULE_KEYS: dict[str, tuple[set[str], set[str]]] = {  # kind -> (required keys, optional keys)
    "range": (set(), {"low", "high"}),
    "sign": ({"sign"}, set()),
    "order": ({"order"}, {"margin"}),
    "share_of_layers": ({"low"}, set()),
    "better_than_control": ({"control", "margin"}, set()),
    "near": ({"target", "tolerance"}, set()),
    "all": ({"parts"}, set()),
}
_REQUIRED = {"id", "statement", "where", "published", "metric", "rule"}
_OPTIONAL = {"quote", "controls", "applies_to", "min_seeds", "organism", "limitations"}
_NUMBERS = {"low", "high", "margin", "target", "tolerance"}


@dataclass(frozen=True)
class Claim:
    """One claim of one paper, with its YAML file's own keys (`roles` is `applies_to.roles`)."""

    paper: str
    id: str
    statement: str
    where: str
    published: Mapping[str, Any]
    metric: Mapping[str, Any]
    rule: Mapping[str, Any]
    controls: tuple[Mapping[str, Any], ...] = ()
    roles: tuple[str, ...] = ()
    min_seeds: int = 3
    organism: bool = True
    quote: str = ""
    limitations: str = ""

    @property
    def published_text(self) -> str:
        """What the paper reports, in its own form; empty where the claim is qualitative."""
        value = self.published.get("value")
        return str(self.published.get("text") or ("" if value is None else value))

    def unit_of(self, name: str) -> str:
        """The unit of a part or a control; empty where the file does not state it.

        `metric.unit` is that of the metric itself and of the paper's and the sound version of it.
        """
        units = self.metric.get("units") or {}
        own = name in (self.metric["name"], "published", "sound")
        return str(units.get(name) or (self.metric["unit"] if own else ""))

    @property
    def decides(self) -> dict[str, Any]:
        """What an outcome depends on: a change in it makes a run stale, a change of wording does not."""
        return {
            "rule": self.rule,
            "controls": [{k: v for k, v in control.items() if k != "why"} for control in self.controls],
            "min_seeds": self.min_seeds,
            "bounds": self.metric.get("bounds"),
        }


def load_claims(paper: str, folder: Path | None = None) -> tuple[Claim, ...]:
    """Read and check `book/claims/<paper>.yml`; raises `InputError` naming file, claim and key."""
    folder = folder or paths.root() / "book" / "claims"
    path = folder / f"{paper}.yml"
    if not path.is_file():
        known = [p.stem for p in sorted(folder.glob("*.yml"))]
        hint = paths.did_you_mean(paper, known)
        raise InputError(f"no claims for paper {paper!r}{hint}; papers: {', '.join(known) or 'none'}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise InputError(f"{path.name}{line}: not valid YAML: {problem}") from None
    if not isinstance(data, dict) or not isinstance(data.get("claims"), list):
        raise InputError(f"{path.name}: key claims: a list of claims is needed")
    if data.get("paper") != paper:
        raise InputError(f"{path.name}: key paper: must be {paper!r}, the file's own name")
    entries = enumerate(data["claims"], 1)
    read = tuple(_Reader(path.name, f"claim {n}").claim(paper, entry) for n, entry in entries)
    ids = [claim.id for claim in read]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise InputError(f"{path.name}: claim {twice[0]}: key id: used twice; every claim needs its own")
    return read


class _Reader:
    """Check one claim's keys, so that each error can name the file, the claim and the key."""

    def __init__(self, file: str, claim: str) -> None:
        self.file, self.name = file, claim

    def fail(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.file}: {self.name}: key {key}: {problem}")

    def mapping(self, data: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise self.fail(where or "?", "a mapping is needed")
        at = f"{where}." if where else ""
        for key in data:
            if key not in required | optional:
                hint = paths.did_you_mean(str(key), required | optional)
                raise self.fail(f"{at}{key}", f"not a key here{hint}")
        for key in sorted(required - set(data)):
            raise self.fail(f"{at}{key}", "missing")
        return data

    def claim(self, paper: str, data: Any) -> Claim:
        if isinstance(data, dict) and isinstance(data.get("id"), str):
            self.name = f"claim {data['id']}"
        data = self.mapping(data, "", _REQUIRED, _OPTIONAL)
        for key in ("id", "statement", "where"):
            if not isinstance(data[key], str) or not data[key].strip():
                raise self.fail(key, "text is needed")
        published = self.mapping(data["published"], "published", {"value"}, {"text"})
        if published["value"] is not None:
            self.number(published["value"], "published.value")
        metric = self.mapping(data["metric"], "metric", {"name", "unit", "notebook"}, {"bounds", "units"})
        if not re.fullmatch(r"[\w-]+/[\w-]+", str(metric["notebook"])):
            raise self.fail("metric.notebook", f"{metric['notebook']!r} is not of the form section/name")
        if (bounds := metric.get("bounds")) is not None:
            if not isinstance(bounds, list) or len(bounds) != 2:
                raise self.fail("metric.bounds", "two numbers [low, high] are needed")
            if self.number(bounds[0], "metric.bounds") >= self.number(bounds[1], "metric.bounds"):
                raise self.fail("metric.bounds", "the first must be less than the second")
        compared = _compared_controls(data["rule"])
        listed = enumerate(data.get("controls") or [])
        controls = tuple(self.control(control, f"controls[{i}]", compared) for i, control in listed)
        names = {control["name"] for control in controls}
        if len(names) < len(controls):
            raise self.fail("controls", "two have the same name")
        self.rule(data["rule"], "rule", names, nested=False)
        self.units(metric.get("units") or {}, names | {metric["name"]} | _parts(data["rule"]))
        roles = self.mapping(data.get("applies_to") or {}, "applies_to", set(), {"roles"}).get("roles") or []
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise self.fail("applies_to.roles", "a list of role names is needed")
        min_seeds = data.get("min_seeds", 3)
        if isinstance(min_seeds, bool) or not isinstance(min_seeds, int) or min_seeds < 1:
            raise self.fail("min_seeds", "a whole number of at least 1 is needed")
        if not isinstance(data.get("organism", True), bool):
            raise self.fail("organism", "true or false is needed")
        return Claim(
            paper=paper,
            id=data["id"],
            statement=data["statement"].strip(),
            where=data["where"],
            published=published,
            metric=metric,
            rule=data["rule"],
            controls=controls,
            roles=tuple(roles),
            min_seeds=min_seeds,
            organism=data.get("organism", True),
            quote=str(data.get("quote") or ""),
            limitations=str(data.get("limitations") or ""),
        )

    def control(self, data: Any, where: str, compared: set[str]) -> dict[str, Any]:
        only_compared = isinstance(data, dict) and data.get("name") in compared
        required = {"name", "why"} | (set() if only_compared else {"rule"})
        data = self.mapping(data, where, required, {"rule"})
        if not isinstance(data["name"], str):
            raise self.fail(f"{where}.name", "text is needed")
        if "rule" in data:
            self.rule(data["rule"], f"{where}.rule", set(), nested=True)
            if data["rule"]["kind"] in ("order", "better_than_control"):
                raise self.fail(f"{where}.rule.kind", f"{data['rule']['kind']} cannot judge a control")
        return data

    def rule(self, data: Any, where: str, controls: set[str], *, nested: bool) -> None:
        kinds = sorted(set(_RULE_KEYS) - ({"all"} if nested else set()))
        kind = data.get("kind") if isinstance(data, dict) else None
        if kind not in kinds:
            raise self.fail(f"{where}.kind", f"{kind!r} is not a rule; kinds: {', '.join(kinds)}")
        required, optional = _RULE_KEYS[kind]
        self.mapping(data, where, required | {"kind"}, optional)
        for key in sorted(_NUMBERS & set(data)):
            self.number(data[key], f"{where}.{key}")
        if kind == "range":
            if not {"low", "high"} & set(data):
                raise self.fail(f"{where}.low", "a range needs low, high or both")
            if data.get("low", -math.inf) > data.get("high", math.inf):
                raise self.fail(f"{where}.low", "is above high")
        if kind == "near" and data["tolerance"] < 0:
            raise self.fail(f"{where}.tolerance", "must not be negative")
        if kind == "sign" and data["sign"] not in ("positive", "negative"):
            raise self.fail(f"{where}.sign", f"{data['sign']!r} is neither positive nor negative")
        if kind == "order" and not (
            isinstance(data["order"], list)
            and len(data["order"]) >= 2
            and all(isinstance(name, str) for name in data["order"])
            and len(set(data["order"])) == len(data["order"])
        ):
            raise self.fail(f"{where}.order", "two or more different names are needed")
        if data.get("margin", 0) < 0:
            raise self.fail(f"{where}.margin", "must not be negative")
        if kind == "better_than_control" and data["control"] not in controls:
            raise self.fail(f"{where}.control", f"{data['control']!r} is not among the claim's controls")
        if kind == "all":
            self.parts(data["parts"], f"{where}.parts", controls)

    def parts(self, parts: Any, where: str, controls: set[str]) -> None:
        if not isinstance(parts, list) or len(parts) < 2:
            raise self.fail(where, "two or more parts are needed")
        for i, part in enumerate(parts):
            part = self.mapping(part, f"{where}[{i}]", {"metric", "rule"}, {"bounds"})
            if not isinstance(part["metric"], str):
                raise self.fail(f"{where}[{i}].metric", "text is needed")
            self.rule(part["rule"], f"{where}[{i}].rule", controls, nested=True)
        names = [part["metric"] for part in parts]
        if len(set(names)) < len(names):
            raise self.fail(where, "two parts have the same metric")

    def units(self, units: Any, known: set[str]) -> None:
        for name, unit in self.mapping(units, "metric.units", set(), known).items():
            if not isinstance(unit, str):
                raise self.fail(f"metric.units.{name}", "text is needed")

    def number(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.fail(where, f"{value!r} is not a number")
        return float(value)


def _parts(rule: Mapping[str, Any]) -> set[str]:
    return {part["metric"] for part in rule.get("parts", [])}


def _compared_controls(rule: Any) -> set[str]:
    """Name the controls that a rule compares with; these need no rule of their own."""
    if not isinstance(rule, dict):
        return set()
    parts = rule.get("parts")
    nested = [p.get("rule") for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    rules = [rule, *nested]
    return {r["control"] for r in rules if isinstance(r, dict) and isinstance(r.get("control"), str)}
