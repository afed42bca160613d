"""What one notebook chooses and others judge: heads, neurons, a direction, made once and handed on with the run.

A selection that is made anew wherever it is needed is another selection each time. So the notebook that makes it says
`rim.hand_on`, `rim run` stores it beside that notebook's claims, and another notebook reads it with `rim.handed_on`;
its run key then holds the first one's, so that a new selection makes what rests on it stale.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from rim_core import checking, paths
from rim_core.errors import IdentityError, InputError

MIME = "application/vnd.rim.handed+json"
FILE = "handed_on.json"
# How a notebook's source names those that it reads from.
READS = re.compile(r"\bhanded_on\(\s*[\"']([\w-]+/[\w-]+)[\"']")


def hand_on(name: str, value: Any) -> Any:
    """Hand a selection on to other notebooks, and give it back; in a notebook it is shown and stored with the run.

    Args:
        name: under which `handed_on` finds it; once a notebook.
        value: numbers, texts, lists, tuples and mappings of them: heads as `(layer, head)`, say.

    Raises:
        InputError: no name, or a value that is none of these.

    Example:
        >>> rim.hand_on("suppressors", [(28, 3), (28, 7)])
        [(28, 3), (28, 7)]
    """
    if not name or not isinstance(name, str):
        raise InputError(f"hand_on: give a name, a text, not {checking.shown(name)}")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise InputError(
            f"hand_on: {name}: {checking.shown(value)} is not made of numbers, texts and lists; for a tensor give "
            ".tolist()"
        ) from None
    if _in_notebook():
        from IPython.display import publish_display_data

        data = {MIME: {"name": name, "value": json.loads(text)}, "text/plain": f"handed on: {name} = {text}"}
        publish_display_data(data)  # type: ignore[no-untyped-call,unused-ignore]
    return value


def handed_on(notebook: str, name: str, *, suite: str) -> Any:
    """Read what another notebook's last run on a suite has handed on, lists as tuples.

    Args:
        notebook: the one that made it, `section/name`, as a text in the call itself: `rim run` reads it there, to run
            that notebook first.
        name: as in `hand_on`.
        suite: the suite's name, or the path of its file.

    Raises:
        InputError: that notebook was not run on the suite, or hands on nothing by this name.
        IdentityError: it could not be measured on this model.

    Example:
        >>> rim.handed_on("one/01_first", "heads", suite="new")
        Traceback (most recent call last):
            ...
        rim_core.errors.InputError: one/01_first was not run on suite new: rim run one/01_first --suite new
    """
    short = paths.suite_name(suite)
    folder = paths.results_dir(paths.root()) / short / notebook / "default"
    if not (folder / "run.json").is_file():
        raise InputError(f"{notebook} was not run on suite {short}: rim run {notebook} --suite {suite}")
    there: Mapping[str, Any] = paths.read_json(folder / FILE) if (folder / FILE).is_file() else {}
    if name in there:
        return _tuples(there[name])
    claims = paths.read_json(folder / "claims.json")
    if any(claim.get("outcome") == "not_applicable" for claim in claims):
        raise IdentityError(f"{notebook} could not be measured on this model, and hands on no {name!r}")
    hint = paths.did_you_mean(name, there)
    raise InputError(f"{notebook} hands on nothing named {name!r}{hint}; it hands on {', '.join(there) or 'nothing'}")


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return False
    return get_ipython() is not None  # type: ignore[no-untyped-call,unused-ignore]
