"""What the residual stream says in the vocabulary, and who wrote it: logit lens, logit attribution, projections.

No weight is read or folded: the model's own modules are run, and transposed by differentiation, so that packed
4-bit weights and LoRA-wrapped projections are measured as they compute. The last layer's lens is the model's
own logits; the terms of an attribution sum to the logit difference. Both are checked, not assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import scipy.stats
import torch
from torch import Tensor

from rim_core.activations import Activations, capture
from rim_core.checks import TOLERANCES
from rim_core.editing import by_layer
from rim_core.errors import IdentityError, InputError
from rim_core.loading import Model
from rim_core.sites import pull_back
from rim_core.tracing import batches, encode

if TYPE_CHECKING:
    import altair as alt

Tokens = str | int | Sequence[str | int]
Positions = str | int | Sequence[int]

MEASURES = {
    "logit": "logit",
    "log_probability": "log-probability (nats)",
    "rank": "rank (0 is the top token)",
}
# Activations held at a time, and logits worked out at a time, in numbers.
_HELD = 2**27
_LOGITS = 2**24


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer's residual stream would answer, for the named tokens.

    Attributes:
        tokens: the tokens' labels; a leading space is shown as "␣". token_ids: their ids.
        layers: -1 is the embedding (the stream before layer 0), l the stream after layer l.
        positions: the positions read, counted from the end.
        logit, log_probability (nats), rank (0 is the top token): each float32
            `[prompt, (position,) layer, token]`, NaN where "all" positions have padding.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    logit: Tensor
    log_probability: Tensor
    rank: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each position, layer, token and measure: mean over texts, 95 % t interval, n."""
        return pd.concat(
            [
                _tidy(
                    _with_positions(getattr(self, measure), 3),
                    position=self.positions,
                    layer=self.layers,
                    token=self.tokens,
                ).assign(measure=measure)
                for measure in MEASURES
            ],
            ignore_index=True,
        )

    def plot(self, measure: str = "log_probability", position: int | None = None) -> "alt.LayerChart":
        """Draw one measure over layers, a line a token, at one position (by default the last one read).

        Raises:
            InputError: a measure or position that this result does not hold.
        """
        from rim_core import charts

        if measure not in MEASURES:
            raise InputError(f"LogitLens.plot: no measure {measure!r}; use one of {', '.join(MEASURES)}")
        where = _held(self.positions, position, "LogitLens.plot")
        frame = self.to_frame().query("measure == @measure and position == @where")
        last = frame[frame["layer"] == max(self.layers)]
        ends = "; ".join(
            f"{token} {mean:.3g}" for token, mean in zip(last["token"], last["mean"], strict=True)
        )
        return charts.by_layer(
            frame,
            "mean",
            series="token",
            title="After which layer would the model say which token?",
            y_title=f"{MEASURES[measure]}, mean of {len(self.logit)} texts",
            description=(
                f"Logit lens at position {where}: {MEASURES[measure]} by layer, -1 being the embedding; "
                f"after layer {max(self.layers)}: {ends}."
            ),
        )


@dataclass(frozen=True, eq=False)
class Attribution:
    """A logit difference at the last token as an exact sum over what wrote the residual stream, in logits.

    `embedding + heads + attention_bias + mlp + constant = logit_difference - residual`, all float32.

    Attributes:
        toward, against: labels of the tokens on either side.
        logit_difference: mean logit of `toward` minus that of `against`, `[prompt]`.
        embedding: `[prompt]`. heads: `[prompt, layer, head]`. attention_bias: the output projections' biases,
            `[prompt, layer]`. mlp: `[prompt, layer]`.
        constant: the share of the final norm's and the head's biases, equal for all prompts.
        residual: what the terms miss of the logit difference, `[prompt]`: rounding.
    """

    toward: tuple[str, ...]
    against: tuple[str, ...]
    logit_difference: Tensor
    embedding: Tensor
    heads: Tensor
    attention_bias: Tensor
    mlp: Tensor
    constant: float
    residual: Tensor

    @property
    def z_scores(self) -> Tensor:
        """How far each head's mean lies from its layer's heads, in their standard deviations, `[layer, head]`.

        Paper C, figure 13. Among H heads no score can exceed (H - 1) / sqrt(H) in size.
        """
        means = self.heads.mean(dim=0)
        return (means - means.mean(dim=1, keepdim=True)) / means.std(dim=1, keepdim=True)

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each component: layer, head, mean over texts, 95 % t interval, n; heads also z."""
        constant = torch.full_like(self.embedding, self.constant)
        frame = _component_frame(
            (-1,),
            {"embedding": self.embedding, "constant": constant},
            {"attention_bias": self.attention_bias, "mlp": self.mlp},
            self.heads,
        )
        frame.loc[frame["component"] == "head", "z"] = self.z_scores.flatten().numpy()
        return frame

    def plot(self) -> "alt.LayerChart":
        """Draw the heads' mean contributions, layer by head."""
        sides = f"{'/'.join(self.toward)} over {'/'.join(self.against)}"
        return _head_map(
            self.to_frame(),
            -1,
            title=f"Which heads push {sides}?",
            value_title="logits toward (mean of texts)",
            what=f"Direct contribution of each head to the logit difference {sides}",
        )

    def plot_layers(self) -> "alt.LayerChart":
        """Draw each layer's mean contribution: all its heads together, and its MLP."""
        from rim_core import charts

        values = torch.stack([self.heads.sum(dim=-1), self.mlp], dim=-1)
        frame = _tidy(values, layer=range(values.shape[1]), series=("attention heads", "MLP"))
        sides = f"{'/'.join(self.toward)} over {'/'.join(self.against)}"
        top = frame.iloc[int(frame["mean"].abs().argmax())]
        return charts.by_layer(
            frame,
            "mean",
            series="series",
            title=f"Which layers push {sides}?",
            y_title=f"logits toward, mean of {len(values)} texts",
            description=(
                f"Direct contribution of each layer to the logit difference {sides}; largest in size: "
                f"{top['series']} of layer {top['layer']} with {top['mean']:.3g}."
            ),
            chance=0.0,
        )


@dataclass(frozen=True, eq=False)
class HeadContributions:
    """What every component writes along a direction: projections on the unit vector, in units of the stream.

    Attributes:
        positions: the positions read, counted from the end.
        heads: `[prompt, (position,) layer, head]`. attention (heads and bias), mlp: `[prompt, (position,) layer]`.
        embedding: on layer 0's direction, `[prompt, (position,)]`. All float32, NaN where "all" positions have
            padding.
    """

    positions: tuple[int, ...]
    heads: Tensor
    attention: Tensor
    mlp: Tensor
    embedding: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Give a row for each component and position: layer, head, mean over texts, 95 % t interval, n."""
        return _component_frame(
            self.positions,
            {"embedding": self.embedding},
            {"attention": self.attention, "mlp": self.mlp},
            self.heads,
        )

    def plot(self, position: int | None = None) -> "alt.LayerChart":
        """Draw the heads' mean contributions, layer by head, at one position (by default the last one read).

        Raises:
            InputError: a position that this result does not hold.
        """
        where = _held(self.positions, position, "HeadContributions.plot")
        return _head_map(
            self.to_frame(),
            where,
            title="Which heads write along the direction?",
            value_title="projection (mean of texts)",
            what=f"Projection of each head's output on the direction at position {where}",
        )


@torch.no_grad()
def logit_lens(
    model: Model,
    texts: Sequence[str],
    tokens: Tokens,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
) -> LogitLens:
    """Read the residual stream after each layer as if it were the last one's, by the model's own final steps.

    Final norm, language-model head, logit scale and soft cap all apply, so the last layer gives the model's
    logits. Source: nostalgebraist (2020); paper C, figure 12.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them (see `format_chat`).
        tokens: strings of one token each, with or without a leading space (as given first; the labels say
            which it was), or ids.
        layers: any of -1 (the embedding) to the last; None is all of these.
        positions: as in `capture`.

    Raises:
        InputError: a string of several tokens, two names for one token, an unknown id, layer or position.
        IdentityError: the last layer's lens is not the model's logits, or padding changes its numbers.
    """
    model.require("logit_lens", "lens", "padding")
    labels, ids = single_tokens(model, tokens)
    wanted = tuple(range(-1, model.n_layers)) if layers is None else tuple(layers)
    if not wanted or (outside := [layer for layer in wanted if not -1 <= layer < model.n_layers]):
        raise InputError(
            f"logit_lens: no layer {outside[0] if wanted else ''!r}; give layers from -1 (the embedding) "
            f"to {model.n_layers - 1}"
        )

    def measure(acts: Activations) -> dict[str, Tensor]:
        stream = torch.cat([acts["resid_pre"][..., :1, :], acts["resid_post"]], dim=-2)
        return _read_out(model, stream[..., [layer + 1 for layer in wanted], :], ids)

    found = _measured(model, texts, ("resid_pre", "resid_post"), positions, measure)
    return LogitLens(labels, ids, wanted, _listed(positions, found["logit"]), **found)


@torch.no_grad()
def direct_logit_attribution(
    model: Model, texts: Sequence[str], toward: Tokens, against: Tokens
) -> Attribution:
    """Split the logit difference at the last token exactly into embedding, heads, biases and MLPs.

    The final norm's scale is frozen at the value it has for that prompt, which makes the readout linear; a
    term's contribution is its inner product with one direction a prompt (Elhage et al. 2021; paper C, figure
    13, which leaves the norm out: for that, see `unembedding_direction` and `head_contributions`). Several
    tokens on a side count by the mean of their logits. Indirect effects, through later layers, are not in it.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them.
        toward, against: token strings or ids, as in `logit_lens`.

    Raises:
        InputError: tokens as in `logit_lens`, or one token on both sides.
        IdentityError: logits that are no linear function of the stream (soft cap, a norm of another kind), a
            stream that is not the sum of what is written to it, or terms that miss the logit difference.
    """
    tool = "direct_logit_attribution"
    layout = model.layout
    if layout.soft_cap is not None:
        raise IdentityError(
            f"{tool} cannot be trusted on {model.name}: its logits are soft-capped at {layout.soft_cap:g}, so they "
            "are no sum of contributions; use logit_lens, or patch"
        )
    model.require(tool, "residual_sum", "lens", "head_sum", "padding")
    sides = [single_tokens(model, toward), single_tokens(model, against)]
    (toward_labels, toward_ids), (against_labels, against_ids) = sides
    named, split = [*toward_ids, *against_ids], len(toward_ids)
    unembedded = unembedding_direction(model, toward, against)
    gain, bias, centred = _final_norm(model)
    head_bias = layout.lm_head(_zeros(model, model.d_model))[named].float().cpu()
    constant = float(
        unembedded @ bias + layout.logit_scale * (head_bias[:split].mean() - head_bias[split:].mean())
    )

    def measure(acts: Activations) -> dict[str, Tensor]:
        last = acts["resid_post"][:, -1]
        logits = layout.readout(last.to(model.device, model.dtype), named).float().cpu()
        directions = _scale(model, last, gain, bias, centred)[:, None] * _centre(gain * unembedded, centred)
        terms = {
            "logit_difference": logits[:, :split].mean(dim=1) - logits[:, split:].mean(dim=1),
            "embedding": (acts["resid_pre"][:, 0] * directions).sum(dim=-1),
            "mlp": (acts["mlp_out"] * directions[:, None]).sum(dim=-1),
        }
        heads, biases = [], []
        for layer in range(model.n_layers):
            pulled = _pulled(model, layer, directions)
            heads.append((acts["head_z"][:, layer] * pulled).sum(dim=-1))
            biases.append(directions @ _attention_bias(model, layer))
        return {**terms, "heads": torch.stack(heads, dim=1), "attention_bias": torch.stack(biases, dim=1)}

    found = _measured(model, texts, ("resid_pre", "resid_post", "head_z", "mlp_out"), "last", measure)
    difference = found.pop("logit_difference")
    terms = torch.cat(
        [values.flatten(1) if values.dim() > 1 else values[:, None] for values in found.values()], 1
    )
    residual = difference - terms.sum(dim=1) - constant
    error = float((residual.abs() / (terms.abs().sum(dim=1) + abs(constant))).max())
    if not error <= TOLERANCES[model.dtype]:
        raise IdentityError(
            f"{tool} cannot be trusted on {model.name} here: the terms miss the logit difference by {error:.1e} of "
            "their size; if an edit of the residual stream is active, leave its context"
        )
    return Attribution(
        toward_labels,
        against_labels,
        logit_difference=difference,
        constant=constant,
        residual=residual,
        **found,
    )


@torch.no_grad()
def head_contributions(
    model: Model, texts: Sequence[str], direction: Any, positions: Positions = "last"
) -> HeadContributions:
    """Project what every head, attention, MLP and the embedding write on a direction: `<W_O z_h, w> / |w|`.

    Source: paper B, head contribution (its figure 6), where `w` is the prober's weight vector and the position
    the last one.

    Args:
        model: a loaded model; the adapter and edits now active apply.
        texts: prompts as the model is to see them.
        direction: `[d_model]`, the same for all layers, or `[layer, d_model]`; array or tensor, any length.
        positions: as in `capture`.

    Raises:
        InputError: a direction of another shape, not finite or zero; texts and positions as in `capture`.
        IdentityError: heads and MLPs do not write to the stream as they are (a norm comes between), attention is
            not the sum of its heads, or padding changes the model's numbers.
    """
    model.require("head_contributions", "residual_sum", "head_sum", "padding")
    directions = by_layer(model, direction).cpu()
    unit = directions / directions.norm(dim=-1, keepdim=True)
    pulled = torch.stack([_pulled(model, layer, unit[layer]) for layer in range(model.n_layers)])

    def measure(acts: Activations) -> dict[str, Tensor]:
        return {
            "heads": (acts["head_z"] * pulled).sum(dim=-1),
            "attention": (acts["attn_out"] * unit).sum(dim=-1),
            "mlp": (acts["mlp_out"] * unit).sum(dim=-1),
            "embedding": acts["resid_pre"][..., 0, :] @ unit[0],
        }

    found = _measured(model, texts, ("resid_pre", "head_z", "attn_out", "mlp_out"), positions, measure)
    return HeadContributions(_listed(positions, found["embedding"]), **found)


@torch.no_grad()
def unembedding_direction(model: Model, toward: Tokens, against: Tokens) -> Tensor:
    """The direction before the final norm's output is unembedded that raises one token's logit over another's.

    Mean of the `toward` rows of the language-model head minus that of the `against` rows, times the logit
    scale: float32 `[d_model]` on the CPU.

    Raises:
        InputError: tokens as in `logit_lens`, or one token on both sides.
    """
    sides = [single_tokens(model, tokens)[1] for tokens in (toward, against)]
    if shared := set(sides[0]) & set(sides[1]):
        raise InputError(
            f"token {_label(model, min(shared))} is on both sides: a difference needs two tokens"
        )
    # Zeros and ones are exact in every dtype; fractions would not be.
    chosen = _zeros(model, 2, _vocabulary(model))
    for row, ids in enumerate(sides):
        chosen[row, list(ids)] = 1
    sums = pull_back(model.layout.lm_head, chosen).float().cpu()
    return model.layout.logit_scale * (sums[0] / len(sides[0]) - sums[1] / len(sides[1]))


def single_tokens(model: Model, tokens: Tokens) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Labels and ids of tokens given by text or id; a text that is one token only with (or without) a leading
    space is taken so, and the label shows the space as "␣".

    Raises:
        InputError: no token, a text of several tokens, an id outside the vocabulary, or one token twice.
    """
    given = [tokens] if isinstance(tokens, str | int) else list(tokens)
    if not given:
        raise InputError("no tokens were named: give at least one")
    ids = [_token_id(model, token) for token in given]
    labels = [_label(model, token) for token in ids]
    for number, token in enumerate(ids):
        if (first := ids.index(token)) < number:
            raise InputError(
                f"{given[first]!r} and {given[number]!r} are one token ({labels[number]}): name it once"
            )
    return tuple(labels), tuple(ids)


def _token_id(model: Model, token: str | int) -> int:
    if not isinstance(token, str):
        if not 0 <= token < _vocabulary(model):
            raise InputError(f"no token {token}: ids go from 0 to {_vocabulary(model) - 1}")
        return int(token)
    tokenizer = model.tokenizer
    for spelling in (token, token[1:] if token.startswith(" ") else f" {token}"):
        found = tokenizer(spelling, add_special_tokens=False).input_ids
        if token and len(found) == 1 and found[0] != tokenizer.unk_token_id:
            return int(found[0])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(token, add_special_tokens=False).input_ids)
    raise InputError(
        f"{token!r} is no single token, with or without a leading space, but {' | '.join(pieces)}: choose another "
        "word, or give the id of its first token"
    )


def _label(model: Model, token: int) -> str:
    # Vocabularies are often padded beyond what the tokenizer names.
    piece = model.tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    return f"␣{piece[1:]}" if piece[0] in "Ġ▁" else piece


def _vocabulary(model: Model) -> int:
    return model.layout.lm_head(_zeros(model, model.d_model)).shape[-1]


def _zeros(model: Model, *shape: int) -> Tensor:
    return torch.zeros(*shape, device=model.device, dtype=model.dtype)


def _read_out(model: Model, h: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
    """Each measure of the tokens `ids`, `[..., token]`, from the stream `h` `[..., d_model]`, a chunk at a time."""
    columns = list(ids)
    parts: dict[str, list[Tensor]] = {measure: [] for measure in MEASURES}
    for chunk in h.flatten(0, -2).split(max(1, _LOGITS // _vocabulary(model))):
        logits = model.layout.readout(chunk.to(model.device, model.dtype)).float()
        named = logits[:, columns]
        parts["logit"].append(named)
        parts["log_probability"].append(named - logits.logsumexp(dim=-1, keepdim=True))
        above = [(logits > named[:, [k]]).sum(dim=-1) for k in range(len(columns))]
        parts["rank"].append(torch.stack(above, dim=-1).float())
    return {measure: torch.cat(values).cpu().unflatten(0, h.shape[:-1]) for measure, values in parts.items()}


def _final_norm(model: Model) -> tuple[Tensor, Tensor, bool]:
    """The final norm's gain (up to a factor) and bias, `[d_model]`, and whether it takes the mean away first.

    Found by running it: on zeros a norm of either kind gives its bias, and so does LayerNorm on equal values; on
    values of mean zero and equal size both give gain and bias.
    """
    norm, ones = model.layout.final_norm, _zeros(model, model.d_model) + 1
    signs = ones.clone()
    signs[1::2] = -1
    bias, level, gain = (norm(x[None]).float().cpu()[0] for x in (0 * ones, ones, signs))
    gain = gain - bias
    centred = bool((level - bias).abs().max() < 1e-2 * gain.abs().max())
    return gain * signs.float().cpu(), bias, centred


def _centre(values: Tensor, centred: bool) -> Tensor:
    return values - values.mean(dim=-1, keepdim=True) if centred else values


def _scale(model: Model, h: Tensor, gain: Tensor, bias: Tensor, centred: bool) -> Tensor:
    """The factor `[prompt]` by which the final norm multiplies each `h` `[prompt, d_model]` besides its gain.

    Raises:
        IdentityError: one factor does not explain what the norm does to `h`.
    """
    normed = model.layout.final_norm(h.to(model.device, model.dtype)).float().cpu() - bias
    plain = gain * _centre(h, centred)
    scale = (normed * plain).sum(dim=-1) / (plain**2).sum(dim=-1)
    error = float((scale[:, None] * plain - normed).abs().max() / normed.abs().max())
    if not error <= TOLERANCES[model.dtype]:
        raise IdentityError(
            f"direct_logit_attribution cannot be trusted on {model.name}: its final norm "
            f"({type(model.layout.final_norm).__name__}) is neither LayerNorm nor RMSNorm (off by {error:.1e}); use "
            "logit_lens, or patch"
        )
    return scale


def _pulled(model: Model, layer: int, directions: Tensor) -> Tensor:
    """`W_O^T r` by head, `[..., head, head_dim]`, for directions `[..., d_model]`."""
    found = pull_back(model.layout.attention_out[layer], directions.to(model.device, model.dtype))
    return found.float().cpu().unflatten(-1, (model.n_heads, model.head_dim))


def _attention_bias(model: Model, layer: int) -> Tensor:
    # Called past the module's hooks: an edit of the heads is no bias.
    forward = model.layout.attention_out[layer].forward
    return forward(_zeros(model, 1, model.n_heads * model.head_dim))[0].float().cpu()


def _measured(
    model: Model,
    texts: Sequence[str],
    sites: Sequence[str],
    positions: Positions,
    measure: Callable[[Activations], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """`measure` of the texts' activations, put together by text; captured in groups that bound what is held."""
    lengths = [len(row) for row in encode(model.tokenizer, texts)]
    read = 1 if isinstance(positions, str | int) else len(positions)
    kept = lengths if positions == "all" else [read] * len(lengths)
    a_token = len(sites) * model.n_layers * max(model.d_model, model.n_heads * model.head_dim)
    result: dict[str, Tensor] = {}
    for rows in batches(kept, max(1, _HELD // a_token)):
        acts = capture(model, [texts[row] for row in rows], sites, positions)
        for name, values in measure(acts).items():
            if acts.mask is not None:
                padded = values.new_full((len(rows), max(lengths), *values.shape[2:]), torch.nan)
                padded[:, -values.shape[1] :][acts.mask] = values[acts.mask]
                values = padded
            whole = result.setdefault(name, values.new_empty(len(lengths), *values.shape[1:]))
            whole[rows] = values
    return result


def _listed(positions: Positions, found: Tensor) -> tuple[int, ...]:
    """The positions behind the axis after the prompt's, or the single one where there is no such axis."""
    if positions == "all":
        return tuple(range(-found.shape[1], 0))
    if isinstance(positions, str | int):
        return (-1,) if isinstance(positions, str) else (positions,)
    return tuple(positions)


def _held(positions: Sequence[int], position: int | None, caller: str) -> int:
    chosen = positions[-1] if position is None else position
    if chosen not in positions:
        raise InputError(
            f"{caller}: position {chosen} was not read; this holds {', '.join(map(str, positions))}"
        )
    return chosen


def _with_positions(values: Tensor, without: int) -> Tensor:
    """`values` with a position axis after the prompt's; they have `without` dimensions where there is none yet."""
    return values.unsqueeze(1) if values.dim() == without else values


def _tidy(values: Tensor, **axes: Sequence[object]) -> pd.DataFrame:
    """A row for each combination of the axes after the texts': mean, Student's 95 % interval (NaN for one text), n."""
    flat = pd.DataFrame(values.flatten(1).double().numpy())
    mean, n = flat.mean(), flat.count()
    half = scipy.stats.t.ppf(0.975, n - 1) * flat.sem()
    index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    summary = pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half, "n": n})
    return summary.set_index(index).reset_index()


def _component_frame(
    positions: Sequence[int], once: Mapping[str, Tensor], by_layer: Mapping[str, Tensor], heads: Tensor
) -> pd.DataFrame:
    layers, n_heads = range(heads.shape[-2]), range(heads.shape[-1])
    parts = [
        _tidy(_with_positions(values, 1), position=positions).assign(component=name)
        for name, values in once.items()
    ]
    parts += [
        _tidy(_with_positions(values, 2), position=positions, layer=layers).assign(component=name)
        for name, values in by_layer.items()
    ]
    parts.append(
        _tidy(_with_positions(heads, 3), position=positions, layer=layers, head=n_heads).assign(
            component="head"
        )
    )
    frame = pd.concat(parts, ignore_index=True).astype({"layer": "Int64", "head": "Int64"})
    return frame[["component", "position", "layer", "head", "mean", "low", "high", "n"]]


def _head_map(
    frame: pd.DataFrame, position: int, title: str, value_title: str, what: str
) -> "alt.LayerChart":
    from rim_core import charts

    heads = frame[(frame["component"] == "head") & (frame["position"] == position)]
    heads = heads.astype({"layer": int, "head": int})
    low, high = heads.iloc[int(heads["mean"].argmin())], heads.iloc[int(heads["mean"].argmax())]
    return charts.heatmap(
        heads,
        "mean",
        x="head",
        y="layer",
        title=title,
        x_title="head",
        y_title="layer",
        value_title=value_title,
        description=(
            f"{what}, mean of {heads['n'].max()} texts; from {low['mean']:.3g} (layer {low['layer']:.0f}, head "
            f"{low['head']:.0f}) to {high['mean']:.3g} (layer {high['layer']:.0f}, head {high['head']:.0f})."
        ),
        diverging=True,
    )
