"""Measure and intervene on language models, in 4 bits, with controls: `import rim_core as rim`.

Names resolve on first use, so importing the package loads neither torch nor Altair.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    name: module
    for module, names in {
        "models.loading": "load roles",
        "models.model": "Model",
        "models.capture": "capture Activations",
        "suites.schema": "load_suite Suite",
        "prompts": "load_prompts Prompt format_chat",
        "models.tokens": "find_span",
        "models.hooks": "edit",
        "tables": "tidy",
        "thoughts": "split_thought",
        "interventions.metrics": "Projection LogitDifference LogProbability RefusalLogOdds ProbeScore LogitMetric",
        "interventions.patching": "patch",
        "interventions.attribution": "attribution_patch",
        "interventions.ablation": "ablate knock_out",
        "interventions.steering": "steer",
        "interventions.controls": "random_heads random_sets random_direction against_random",
        "measures.probes": "probe_layers",
        "measures.lens": "logit_lens",
        "measures.contributions": "direct_logit_attribution head_contributions unembedding_direction",
        "measures.attention": "attention_patterns attention_to_spans",
        "measures.directions": "difference_in_means project cosine whitened_cosine separation",
        "measures.rotations": "procrustes procrustes_ranks",
        "measures.subspaces": "principal_angles shared_subspace erosion_fraction",
        "measures.neurons": "neurons_above safety_neurons activation_shift",
        "measures.gradients": "gradient_cosines per_example_gradients",
        "measures.likelihood": "log_likelihood kl_divergence",
        "sae.autoencoder": "splice",
        "sae.training": "train_sae",
        "sae.judging": "evaluate_sae cross_entropy_recovered latent_correlations random_features",
        "sae.files": "save_sae load_sae",
        "behaviour.generation": "generate refusals refusal_rate attack_successes attack_success_rate compare_rates",
        "behaviour.judges": "StringJudge Question",
        "behaviour.model_judges": "PromptJudge ClassifierJudge",
        "behaviour.server_judge": "ServerJudge",
        "behaviour.openings": "refusal_log_odds opening_tokens",
        "behaviour.coherence": "perplexity coherence",
        "verdicts.deciding": "claims",
    }.items()
    for name in names.split()
}
# Modules by the last part of their name; `rim.charts` and `rim.stats` are as often used as any function.
_MODULES = {
    path.rpartition(".")[2]: path
    for path in (
        *_PUBLIC.values(),
        *("charts", "errors", "stats", "texts", "organisms", "sae"),
        *("models.checks", "models.hooks", "models.layout", "measures.writes"),
    )
} | {
    "editing": "models.hooks",
    "sites": "models.layout",
    "activations": "models.capture",
    "outcomes": "verdicts.deciding",
}
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
