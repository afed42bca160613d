"""Measure and intervene on language models, in 4 bits, with controls: `import rim_core as rim`.

Names resolve on first use, so importing the package loads neither torch nor Altair.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    name: module
    for module, names in {
        "loading": "load roles Model",
        "suitefile": "load_suite Suite",
        "prompts": "load_prompts Prompt format_chat",
        "texts": "find_span",
        "thoughts": "split_thought",
        "activations": "capture Activations",
        "probes": "probe_layers adjacent_similarity",
        "metrics": "Projection LogitDifference ProbeScore",
        "patching": "patch neurons_above",
        "attribution": "attribution_patch",
        "ablation": "ablate random_heads random_sets knock_out",
        "steering": "steer random_direction",
        "lens": "logit_lens",
        "contributions": "direct_logit_attribution head_contributions",
        "unembedding": "unembedding_direction",
        "attention": "attention_patterns attention_to_spans",
        "directions": "difference_in_means project cosine whitened_cosine",
        "rotations": "procrustes procrustes_ranks",
        "subspaces": "principal_angles shared_subspace",
        "erosion": "erosion_fraction",
        "neurons": "safety_neurons activation_shift",
        "gradients": "gradient_cosines per_example_gradients",
        "likelihood": "log_likelihood kl_divergence",
        "sae": "splice",
        "sae_training": "train_sae",
        "sae_evaluation": "evaluate_sae cross_entropy_recovered",
        "sae_latents": "latent_correlations random_features",
        "sae_files": "save_sae load_sae",
        "behaviour": "generate refusals refusal_rate attack_successes attack_success_rate compare_rates",
        "judges": "StringJudge Question",
        "judgemodels": "PromptJudge ClassifierJudge",
        "judgeserver": "ServerJudge",
        "openings": "refusal_log_odds opening_tokens",
        "fluency": "perplexity coherence",
        "outcomes": "claims",
    }.items()
    for name in names.split()
}
_MODULES = {
    *_PUBLIC.values(),
    *("charts", "checks", "editing", "errors", "organisms", "runner", "sites", "stats", "writes"),
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
