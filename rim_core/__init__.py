"""Measure and intervene on language models, in 4 bits, with controls: `import rim_core as rim`.

Names resolve on first use, so importing the package loads neither torch nor Altair.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "loading",
    "load_suite": "loading",
    "Model": "loading",
    "Suite": "loading",
    "load_prompts": "prompts",
    "Prompt": "prompts",
    "format_chat": "prompts",
    "capture": "activations",
    "Activations": "activations",
    "probe_layers": "probes",
    "adjacent_similarity": "probes",
    "generate": "behaviour",
    "refusal_rate": "behaviour",
    "attack_success_rate": "behaviour",
    "claims": "outcomes",
    "patch": "patching",
    "attribution_patch": "attribution",
    "neurons_above": "patching",
    "Projection": "metrics",
    "LogitDifference": "metrics",
    "ProbeScore": "metrics",
    "find_span": "tracing",
}
_MODULES = {
    "activations",
    "attribution",
    "behaviour",
    "charts",
    "checks",
    "editing",
    "errors",
    "loading",
    "metrics",
    "organisms",
    "outcomes",
    "patching",
    "probes",
    "prompts",
    "runner",
    "sites",
    "stats",
    "tracing",
}
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
