"""Model organisms: training a suite's roles from their recipes, and measuring what they must show.

`recipes.yml` holds each role's recipe; `<suite>/<role>/` an adapter with its recipe, seed and hashes;
`<suite>/measured/` what was measured of each training, prompt by prompt, and the table made of it; `<suite>/traced/`
what was measured of a training at its checkpoints; `<suite>/README.md` the log of the search. Read first `building`.

- `building`: `train`, from a recipe to a folder in which the suite finds the role.
- `fitting`: a recipe fitted to another model than the default one.
- `training`: the loop. `resuming`: what a training that was stopped goes on from.
- `tracing`: `trace` measures a training at each of its checkpoints.
- `measuring`: `check` measures every training again, on held-out categories; `tabulating`: the table made of it.
- `shipped`: what there is, read from files alone.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "building": ("train",),
    "fitting": ("dequantise", "peft_config"),
    "measuring": ("AdviceJudge", "check"),
    "shipped": ("METRICS", "listing", "recipe", "recipes", "shipped_folder", "shipped_table"),
    "tabulating": ("TARGETS", "Measured", "table"),
    "tracing": ("Trace", "save_trace", "shipped_traces", "trace"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # On first use, so that what only lists does not load torch.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
