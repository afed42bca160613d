"""Who wrote the residual stream: logit differences as sums over heads and MLPs, and projections of what each writes.

No weight is read or folded: the model's own modules are run, and transposed by differentiation, so that packed
4-bit weights and LoRA-wrapped projections are measured as they compute. Where a family normalises what attention and
MLP write before it is added to the stream (Gemma-2 and -3, OLMo-2), each head's part is carried through that norm at
the scale that it has there, as through the final norm (see `writes`). The terms of an attribution sum to the logit
difference, which is checked, not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from rim_core.errors import IdentityError
from rim_core.measures.writes import added, held, held_scale, way
from rim_core.models.capture import Activations, drawn, measure
from rim_core.models.checks import tolerance
from rim_core.models.hooks import by_layer
from rim_core.models.layout import pull_back
from rim_core.models.model import Model
from rim_core.models.norms import Norm, parts
from rim_core.models.padding import Positions
from rim_core.models.tokens import Tokens, two_sides
from rim_core.tables import by_axes

if TYPE_CHECKING:
    import altair as alt


@dataclass(frozen=True, eq=False)
class Attribution:
    """A logit difference at the last token as an exact sum over what wrote the residual stream, in logits.

    `embedding + heads + attention_bias + mlp + constant = logit_difference - residual`, all float32.

    Attributes:
        toward: labels of the tokens on the one side.
        against: and on the other.
        logit_difference: mean logit of `toward` minus that of `against`, `[prompt]`; before the soft cap that
            Gemma-2 puts on its logits.
        embedding: `[prompt]`.
        heads: `[prompt, layer, head]`.
        attention_bias: the output projections' biases and those of the norm after them, `[prompt, layer]`.
        mlp: `[prompt, layer]`.
        constant: the share of the final norm's and the head's biases, equal for all prompts.
        residual: what the terms miss of the logit difference, `[prompt]`: rounding.
    """

    toward: tuple[str, ...]
    against: tuple[str, ...]
    logit_difference: Tensor = field(repr=False)
    embedding: Tensor = field(repr=False)
    heads: Tensor = field(repr=False)
    attention_bias: Tensor = field(repr=False)
    mlp: Tensor = field(repr=False)
    constant: float
    residual: Tensor = field(repr=False)

    @property
    def z_scores(self) -> Tensor:
        """How far each head's mean lies from its layer's heads, in their standard deviations, `[layer, head]`.

        Paper C, figure 13. Among H heads no score can exceed (H - 1) / sqrt(H) in size.
        """
        means = self.heads.mean(dim=0)
        return (means - means.mean(dim=1, keepdim=True)) / means.std(dim=1, keepdim=True)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each component: layer, head, estimate (mean over texts), 95 % t interval, n; heads also z."""
        constant = torch.full_like(self.embedding, self.constant)
        whole = {"embedding": self.embedding, "constant": constant}
        frame = _component_frame((-1,), self.heads, **whole, attention_bias=self.attention_bias, mlp=self.mlp)
        frame.loc[frame["component"] == "head", "z"] = self.z_scores.flatten().numpy()
        return frame

    def plot(self) -> "alt.LayerChart":
        """Draw the heads' mean contributions, layer by head."""
        return _head_map(
            self.to_frame(),
            -1,
            "contribution",
            title=f"Which heads push {self._sides}?",
            value_title="logits toward (mean of texts)",
        )

    def plot_layers(self) -> "alt.LayerChart":
        """Draw each layer's mean contribution: all its heads together, and its MLP."""
        from rim_core import charts

        values = torch.stack([self.heads.sum(dim=-1), self.mlp], dim=-1)
        frame = by_axes(values, layer=range(values.shape[1]), series=("attention heads", "MLP"))
        return charts.by_layer(
            frame.rename(columns={"estimate": "contribution"}),
            "contribution",
            series="series",
            title=f"Which layers push {self._sides}?",
            y_title=f"logits toward, mean of {len(values)} texts",
            chance=0.0,
        )

    @property
    def _sides(self) -> str:
        return f"{'/'.join(self.toward)} over {'/'.join(self.against)}"


@dataclass(frozen=True, eq=False)
class HeadContributions:
    """What every component writes along a direction: projections on the unit vector, in units of the stream.

    Attributes:
        positions: the positions read, counted from the end.
        heads: float32 `[prompt, (position,) layer, head]`, NaN where "all" positions have padding; so all others.
        attention: heads and bias, `[prompt, (position,) layer]`.
        mlp: `[prompt, (position,) layer]`.
        embedding: on layer 0's direction, `[prompt, (position,)]`.
    """

    positions: tuple[int, ...]
    heads: Tensor = field(repr=False)
    attention: Tensor = field(repr=False)
    mlp: Tensor = field(repr=False)
    embedding: Tensor = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each component and position: layer, head, estimate (mean over texts), 95 % t interval, n."""
        return _component_frame(
            self.positions, self.heads, embedding=self.embedding, attention=self.attention, mlp=self.mlp
        )

    def plot(self, *, position: int | None = None) -> "alt.LayerChart":
        """Draw the heads' mean contributions, layer by head, at one position (by default the last one read).

        Raises:
            InputError: a position that this result does not hold.
        """
        where = drawn(self.positions, position, "HeadContributions.plot")
        return _head_map(
            self.to_frame(),
            where,
            "projection",
            title="Which heads write along the direction?",
            value_title="projection (mean of texts)",
        )


@torch.no_grad()
def unembedding_direction(model: Model, toward: Tokens, against: Tokens) -> Tensor:
    """The direction before the final norm's output is unembedded that raises one token's logit over another's.

    Mean of the `toward` rows of the language-model head minus that of the `against` rows, times the logit
    scale: float32 `[d_model]` on the CPU.

    Args:
        model: a loaded model; the adapter now active applies.
        toward: token strings or ids, one or several, as in `logit_lens`.
        against: those on the other side.

    Raises:
        InputError: tokens as in `logit_lens`, or one token on both sides.

    Example:
        >>> rim.unembedding_direction(model, "How", ["Why", 9]).shape == (model.d_model,)
        True
    """
    sides = [ids for _, ids in two_sides(model, toward, against)]
    # Zeros and ones are exact in every dtype; fractions would not be.
    chosen = torch.zeros(2, model.layout.d_vocab, device=model.device, dtype=model.dtype)
    for row, ids in enumerate(sides):
        chosen[row, list(ids)] = 1
    sums = pull_back(model.layout.lm_head, chosen).float().cpu()
    return model.layout.logit_scale * (sums[0] / len(sides[0]) - sums[1] / len(sides[1]))


def final_norm(model: Model) -> Norm:
    """The final norm's parts, found by running it: what holds its scale still makes of the readout a linear map."""
    return parts(model.layout.final_norm, model.d_model, model.device, model.dtype)


def norm_scale(model: Model, norm: Norm, h: Tensor, tool: str) -> Tensor:
    """The factor `[prompt]` by which the final norm multiplies `norm.linear(h)` for each `h` `[prompt, d_model]`.

    Raises:
        IdentityError: one factor does not explain what the norm does to `h`.
    """
    return held_scale(model, norm, model.layout.final_norm, h, tool, "final norm")


@torch.no_grad()
def direct_logit_attribution(model: Model, texts: Sequence[str], toward: Tokens, against: Tokens) -> Attribution:
    """Split the logit difference at the last token exactly into embedding, heads, biases and MLPs.

    The final norm's scale is frozen at the value it has for that prompt, which makes the readout linear; a
    term's contribution is its inner product with one direction a prompt (Elhage et al. 2021; paper C, figure
    13, which leaves the norm out: for that, see `unembedding_direction` and `head_contributions`). So is that of
    the norms that some families put on what attention and MLP write. Several tokens on a side count by the mean of
    their logits. A soft cap (Gemma-2) is no part of the sum: it squashes each logit, and keeps their order. Indirect
    effects, through later layers, are not in it.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them.
        toward: token strings or ids, as in `logit_lens`.
        against: those on the other side.

    Raises:
        InputError: tokens as in `logit_lens`, or one token on both sides.
        IdentityError: a norm that is neither LayerNorm nor RMSNorm, a stream that is not the sum of what is written
            to it, or terms that miss the logit difference.

    Example:
        >>> found = rim.direct_logit_attribution(model, texts, "How", "Why")
        >>> terms = found.heads.sum((1, 2)) + (found.mlp + found.attention_bias).sum(1) + found.embedding
        >>> bool((terms + found.constant - found.logit_difference).abs().max() < 1e-3)
        True
    """
    tool = "direct_logit_attribution"
    layout = model.layout
    model.require(tool, "residual_sum", "lens", "head_sum", "padding")
    (toward_labels, toward_ids), (against_labels, against_ids) = two_sides(model, toward, against)
    named, split = [*toward_ids, *against_ids], len(toward_ids)
    unembedded = unembedding_direction(model, toward_ids, against_ids)
    norm = final_norm(model)
    ways = [way(model, "attn_out", layer) for layer in range(model.n_layers)]
    nothing = torch.zeros(1, model.d_model, device=model.device, dtype=model.dtype)
    head_bias = layout.lm_head(nothing)[0, named].float().cpu()
    constant = float(
        unembedded @ norm.bias + layout.logit_scale * (head_bias[:split].mean() - head_bias[split:].mean())
    )

    def read(acts: Activations) -> dict[str, Tensor]:
        last = acts["resid_post"][:, -1]
        logits = layout.readout(last.to(model.device, model.dtype), named, capped=False).float().cpu()
        directions = norm_scale(model, norm, last, tool)[:, None] * norm.transposed(unembedded)
        terms = {
            "logit_difference": logits[:, :split].mean(dim=1) - logits[:, split:].mean(dim=1),
            "embedding": (acts["resid_pre"][:, 0] * directions).sum(dim=-1),
            "mlp": (_all_added(model, "mlp_out", acts["mlp_out"]) * directions[:, None]).sum(dim=-1),
        }
        heads, biases = [], []
        for layer, passage in enumerate(ways):
            before = passage.back(directions)
            by_head = (acts["head_z"][:, layer] * _pulled(model, layer, before)).sum(dim=-1)
            bias = before @ _attention_bias(model, layer)
            if passage.norm is not None:
                scale = held(model, passage, "attn_out", layer, acts["attn_out"][:, layer], tool)
                by_head, bias = by_head * scale[:, None], bias * scale + passage.bias(directions)
            heads.append(by_head)
            biases.append(bias)
        return {**terms, "heads": torch.stack(heads, dim=1), "attention_bias": torch.stack(biases, dim=1)}

    sites = ["resid_pre", "resid_post", "head_z", "mlp_out"]
    if any(passage.norm is not None for passage in ways):
        sites.append("attn_out")
    _, found = measure(model, texts, sites, "last", read)
    difference = found.pop("logit_difference")
    terms = torch.cat([values.reshape(len(values), -1) for values in found.values()], dim=1)
    residual = difference - terms.sum(dim=1) - constant
    error = float((residual.abs() / (terms.abs().sum(dim=1) + abs(constant))).max())
    if not error <= tolerance(model.dtype):
        raise IdentityError(
            f"{tool} cannot be trusted on {model.name} here: the terms miss the logit difference by {error:.1e} of "
            "their size; if an edit of the residual stream is active, leave its context"
        )
    return Attribution(
        toward_labels, against_labels, logit_difference=difference, constant=constant, residual=residual, **found
    )


@torch.no_grad()
def head_contributions(
    model: Model, texts: Sequence[str], direction: Any, *, positions: Positions = "last"
) -> HeadContributions:
    """Project what every head, attention, MLP and the embedding write on a direction: `<W_O z_h, w> / |w|`.

    What is written is what is added to the stream: in families with a norm between, what the norm makes of it at
    the scale that it has at that position.

    Source: paper B, head contribution (its figure 6), where `w` is the prober's weight vector and the position
    the last one.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them.
        direction: `[d_model]`, the same for all layers, or `[layer, d_model]`; array or tensor, any length.
        positions: as in `capture`.

    Raises:
        InputError: a direction of another shape, not finite or zero; texts and positions as in `capture`.
        IdentityError: the stream is not the sum of what heads and MLPs write, through a norm of a known kind where
            one comes between, attention is not the sum of its heads, or padding changes the model's numbers.

    Example:
        >>> direction = rim.unembedding_direction(model, "How", "Why")
        >>> rim.head_contributions(model, texts, direction).heads.shape == (len(texts), model.n_layers, model.n_heads)
        True
    """
    tool = "head_contributions"
    model.require(tool, "residual_sum", "head_sum", "padding")
    directions = by_layer(model, direction).cpu()
    unit = directions / directions.norm(dim=-1, keepdim=True)
    ways = [way(model, "attn_out", layer) for layer in range(model.n_layers)]
    pulled = torch.stack([_pulled(model, layer, passage.back(unit[layer])) for layer, passage in enumerate(ways)])

    def read(acts: Activations) -> dict[str, Tensor]:
        heads = (acts["head_z"] * pulled).sum(dim=-1)
        for layer, passage in enumerate(ways):
            if passage.norm is not None:
                output = acts["attn_out"][..., layer, :]
                heads[..., layer, :] *= held(model, passage, "attn_out", layer, output, tool)[..., None]
        return {
            "heads": heads,
            "attention": (_all_added(model, "attn_out", acts["attn_out"]) * unit).sum(dim=-1),
            "mlp": (_all_added(model, "mlp_out", acts["mlp_out"]) * unit).sum(dim=-1),
            "embedding": acts["resid_pre"][..., 0, :] @ unit[0],
        }

    listed, found = measure(model, texts, ("resid_pre", "head_z", "attn_out", "mlp_out"), positions, read)
    return HeadContributions(listed, **found)


def _all_added(model: Model, site: str, outputs: Tensor) -> Tensor:
    """What each layer adds, given `attn_out` or `mlp_out` as captured, `[..., layer, d_model]`."""
    if all(way(model, site, layer).plain for layer in range(model.n_layers)):
        return outputs
    layers = [added(model, site, layer, outputs[..., layer, :]) for layer in range(model.n_layers)]
    return torch.stack(layers, dim=-2)


def _pulled(model: Model, layer: int, directions: Tensor) -> Tensor:
    """`W_O^T r` by head, `[..., head, head_dim]`, for directions `[..., d_model]`."""
    found = pull_back(model.layout.attention_out[layer], directions.to(model.device, model.dtype))
    return found.float().cpu().unflatten(-1, (model.n_heads, model.head_dim))


def _attention_bias(model: Model, layer: int) -> Tensor:
    # Called past the module's hooks: an edit of the heads is no bias.
    nothing = torch.zeros(1, model.n_heads * model.head_dim, device=model.device, dtype=model.dtype)
    return model.layout.attention_out[layer].forward(nothing)[0].float().cpu()


def _component_frame(positions: Sequence[int], heads: Tensor, **others: Tensor) -> pd.DataFrame:
    """Rows of all components; the others have no head axis, and some no layer axis."""
    axes = {"position": positions, "layer": range(heads.shape[-2]), "head": range(heads.shape[-1])}
    rows = []
    for name, values in {**others, "head": heads}.items():
        own = list(axes)[: values.dim() - heads.dim() + len(axes)]
        rows.append(by_axes(values, **{axis: axes[axis] for axis in own}).assign(component=name))
    frame = pd.concat(rows, ignore_index=True).astype({"layer": "Int64", "head": "Int64"})
    return frame[["component", "position", "layer", "head", "estimate", "low", "high", "n"]]


def _head_map(frame: pd.DataFrame, position: int, value: str, **titles: str) -> "alt.LayerChart":
    from rim_core import charts

    heads = frame[(frame["component"] == "head") & (frame["position"] == position)].astype({"layer": int, "head": int})
    return charts.heatmap(heads.rename(columns={"estimate": value}), value, diverging=True, **titles)
