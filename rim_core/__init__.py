"""Measure and intervene on language models, in 4 bits, with controls: `import rim_core as rim`.

Read `models` first, where a model is loaded, captured and edited; then the technique you want. Each folder's own
docstring says what is in it.

- `models`: a model with its roles, what it computes layer by layer, and hooks; `texts` and `thoughts`: what it reads
  and says.
- `interventions`: patching, ablation, steering; `measures`: probes, directions, lens, attribution; `sae`: sparse
  autoencoders; `behaviour`: answers and their judges.
- `prompts`: prompt sets; `suites`: which weights a role is; `organisms`: how a role is trained; `verdicts`: whether a
  claim holds.
- `stats`: intervals and tests; `tables`: results as tidy tables; `charts`: figures.
- `handed`: what one notebook chooses and others judge.
- Below all: `checking` and `errors` (what a user is told), `paths`, `identity`, `offline`, `locks`.

Names resolve on first use, so importing the package loads neither torch nor Altair.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rim_core.paths import did_you_mean

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
        "behaviour.generation": "generate",
        "behaviour.rates": "refusals refusal_rate attack_successes attack_success_rate compare_rates",
        "behaviour.judges": "StringJudge Question",
        "behaviour.model_judges": "PromptJudge ClassifierJudge",
        "behaviour.server_judge": "ServerJudge",
        "behaviour.openings": "refusal_log_odds opening_tokens",
        "behaviour.coherence": "perplexity coherence",
        "behaviour.weaknesses": "weaknesses",
        "verdicts.deciding": "claims",
        "handed": "hand_on handed_on",
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
# What other libraries call it.
_ELSEWHERE = {
    name: wanted
    for wanted, names in {
        "load": "load_model HookedTransformer TransformerBridge LanguageModel StandardizedTransformer from_pretrained",
        "capture": "collect run_with_cache ActivationCache cache record_activations get_activations activations_of",
        "edit": "hook run_with_hooks intervene trace add_hook add_hooks HookPoint",
        "patch": "activation_patching causal_tracing path_patching interchange_intervention",
        "attribution_patch": "attribution_patching eap",
        "ablate": "zero_ablation mean_ablation abliterate orthogonalize",
        "steer": "add SteeringVector steering_vector activation_addition caa",
        "difference_in_means": "mean_diff diff_in_means direction refusal_direction mean_difference",
        "logit_lens": "tuned_lens unembed accumulated_resid",
        "direct_logit_attribution": "dla logit_attrs",
        "attention_patterns": "attention_pattern attention_probs",
        "probe_layers": "probe train_probe linear_probe LinearProbe",
        "LogitDifference": "logit_diff",
        "LogitMetric": "metric",
        "tidy": "to_csv to_frame",
        "charts.save": "save_chart save_html",
        "splice": "SAE HookedSAETransformer SparseAutoencoder",
        "find_span": "token_positions find_token find_tokens",
        "format_chat": "chat apply_chat_template",
    }.items()
    for name in names.split()
}
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    # `from rim_core import module` asks for the attribute first, and tools ask for underscores: nothing is loaded.
    quiet = name.startswith("_") or find_spec(f"{__name__}.{name}")
    raise AttributeError(f"rim has no {name!r}{'' if quiet else _hint(name)}")


def _hint(name: str) -> str:
    if known := _ELSEWHERE.get(name):
        return f": that is rim.{known} here"
    inside = {f"rim.{module}": import_module(f"{__name__}.{module}").__all__ for module in ("stats", "charts")}
    for module, names in inside.items():
        if name in names:
            return f": that is {module}.{name}"
    if hasattr(import_module(f"{__name__}.models.model").Model, name):
        return f": that is model.{name}, of a model that is loaded"
    return did_you_mean(name, [*_PUBLIC, *(each for names in inside.values() for each in names)])


def __dir__() -> list[str]:
    return __all__
