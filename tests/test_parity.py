"""rim_core against TransformerLens 4.3 on SmolLM2 in float32, where `benchmarks/requirements.txt` is installed."""

import pytest
import torch

import rim_core as rim

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: see benchmarks/requirements.txt")
from transformer_lens.tools.analysis import attribution_patching, direct_logit_attribution, logit_lens

from benchmarks import peers

# Of equal length in tokens: TransformerLens's attribution patching needs that.
SOURCE = "The Eiffel Tower is a famous building in the city of"
DESTINATION = "The Leaning Tower is a famous building in the city of"
TOWARD, AGAINST = " Paris", " Rome"
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def model():
    return rim.load("smollm2:base", quantization=None, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def lens(model):
    """TransformerLens with its own copy of the weights."""
    return peers.TransformerLens(model)


@pytest.fixture(scope="module")
def ids(model):
    """Token ids `[1, token]` of source and destination."""
    return [torch.tensor([model.tokenizer(text).input_ids]) for text in (SOURCE, DESTINATION)]


@pytest.fixture(scope="module")
def tokens(model):
    return [model.tokenizer(token, add_special_tokens=False).input_ids[0] for token in (TOWARD, AGAINST)]


def assert_close(found, wanted, relative=RELATIVE):
    """Largest difference over the largest value: effects of single components are small beside that."""
    found, wanted = torch.as_tensor(found).float(), torch.as_tensor(wanted).float()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= relative * wanted.abs().max()


@torch.no_grad()
def test_logit_lens(model, lens, ids, tokens):
    ours = rim.logit_lens(model, [DESTINATION], [TOWARD, AGAINST])
    # Both read the embedding first, then the stream after each layer.
    theirs = logit_lens(lens.bridge, ids[1], vocab=tokens).values
    assert_close(ours.logit[0], theirs.reshape(len(ours.layers), 2))


@torch.no_grad()
def test_direct_logit_attribution(model, ids, tokens):
    folded = peers.bridge(model)
    folded.enable_compatibility_mode(disable_warnings=True)
    ours = rim.direct_logit_attribution(model, [DESTINATION], TOWARD, AGAINST)
    theirs = direct_logit_attribution(folded, ids[1], tokens[0], tokens[1], unit="component")
    by_label = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
    layers = range(model.n_layers)
    attention = ours.heads[0].sum(-1) + ours.attention_bias[0]
    assert_close(attention, [by_label[f"{i}_attn_out"] for i in layers], 1e-3)
    assert_close(ours.mlp[0], [by_label[f"{i}_mlp_out"] for i in layers], 1e-3)
    heads = direct_logit_attribution(folded, ids[1], tokens[0], tokens[1], unit="head")
    named = dict(zip(heads.labels, heads.attribution.flatten().tolist(), strict=True))
    wanted = torch.tensor([[named[f"L{i}H{head}"] for head in range(model.n_heads)] for i in layers])
    assert_close(ours.heads[0], wanted, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("component", ["heads", "attention", "mlp"])
def test_patching(model, lens, ids, tokens, component):
    layers = [0, 11, 29]
    ours = rim.patch(model, [SOURCE], [DESTINATION], component, rim.LogitDifference(TOWARD, AGAINST), layers=layers)
    values = lens.source(ids[0], component)[0]

    def score(logits):
        return logits[0, tokens[0]] - logits[0, tokens[1]]

    clean = score(lens.bridge(ids[1])[:, -1])
    assert_close(ours.clean[0], clean)
    wanted = torch.zeros_like(ours.effects[0])
    for row, layer in enumerate(layers):
        if component == "heads":
            for head in range(model.n_heads):
                wanted[row, head] = score(lens.patched(ids[1], component, layer, head, values[layer, head])) - clean
        else:
            wanted[row] = score(lens.patched(ids[1], component, layer, None, values[layer])) - clean
    # An effect is a small difference of logits, which carry the rounding of both.
    assert_close(ours.effects[0], wanted, 1e-3)


def test_attribution_patching(model, lens, ids, tokens):
    metric = rim.LogitDifference(TOWARD, AGAINST)
    heads = rim.attribution_patch(model, [SOURCE], [DESTINATION], "heads", metric).effects[0]
    mlp = rim.attribution_patch(model, [SOURCE], [DESTINATION], "mlp", metric).effects[0]

    def difference(logits):
        return logits[0, -1, tokens[0]] - logits[0, -1, tokens[1]]

    lens.bridge.original_model.requires_grad_(True)
    # Its "clean" run is where values come from, its "corrupt" run where they go and gradients are taken.
    scores = attribution_patching.attribution_patch(lens.bridge, ids[0], ids[1], difference).node_scores
    last = ids[1].shape[1] - 1
    at_last = {(node.kind, node.layer, node.head): s for node, s in scores.items() if node.position == last}
    layers = range(model.n_layers)
    wanted = [[at_last["attn_head_out", i, head] for head in range(model.n_heads)] for i in layers]
    assert_close(heads, wanted, 1e-3)
    assert_close(mlp, [at_last["mlp_out", i, None] for i in layers], 1e-3)
