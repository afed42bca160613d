"""nnsight: its view of a model here, and reading a model that runs at NDIF (Fiotto-Kaufman et al. 2024).

No other module imports nnsight. The measured paths of `rim_core` use plain PyTorch hooks (see `hooks.reading`), which
cost next to nothing. The weights of a model at NDIF never come here. The blocks under `trace` are sent there as source
text and run beside the model, so they use torch, plain numbers and nothing of this package. Activations come back at
the positions asked for; logits stay, and what is read off them comes.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rim_core.errors import InputError, RimError
from rim_core.models import checks
from rim_core.models.batching import batches
from rim_core.models.layout import find_layout
from rim_core.models.padding import pad_left
from rim_core.suites.schema import Role, Suite, is_local, load_suite
from rim_core.texts import encode

# By the names that they give to `Model.require`.
TOOLS = ("capture", "logit_lens", "log_likelihood")
# How nnsight runs a trace; "local" would run it in this process, through all of the way but the network.
_MODE: bool | str = True
# The sites, and what attention and MLP add after their norms, in the order in which a trace must read them: their own.
_IN_ORDER = ("resid_pre", "head_z", "attn_out", "attn_added", "mlp_neurons", "mlp_out", "mlp_added", "resid_post")
# Padded tokens a request, and logits worked out at a time there.
TOKENS, _LOGITS = 2048, 2**24


def refusal(what: str) -> InputError:
    """Say that something cannot be done to a model at NDIF, and what to do."""
    return InputError(
        f"{what} cannot run at NDIF, where only {', '.join(TOOLS)} do: it edits the model, or needs weights or "
        "gradients here; load the model without remote, on a machine that holds it"
    )


def hosted(ref: str, suite: Suite | None, role: Role | None) -> tuple[str, str | None]:
    """The repository on the hub, and its revision, that NDIF may host for a reference.

    Raises:
        InputError: an adapter, or a model that is not on the hub.
    """
    if role is not None and role.adapter:
        raise InputError(
            f"{ref} is an adapter, and NDIF runs checkpoints as they are: name a role that is one, or load it without "
            "remote"
        )
    if role is not None and role.checkpoint:
        repository, revision = role.checkpoint, None
    elif suite is not None:
        repository, revision = suite.base.hub or "", suite.base.revision
    else:
        repository, revision = ref, None
    if is_local(repository) or repository.count("/") != 1:
        raise InputError(f"{ref} is not on the hub, and NDIF hosts models by their hub id: load it without remote")
    return repository, revision


def require_suite(name: str) -> None:
    """Refuse to start on a suite whose base NDIF cannot host, or without a key; raises InputError."""
    suite = load_suite(name)
    hosted(f"the base of {suite.name}", suite, None)
    require_key()


def nnsight_model(hf: Any, tokenizer: Any) -> Any:
    """The model wrapped by nnsight; its trace gives the Hugging Face forward bit for bit."""
    from nnsight import TransformersModel

    return TransformersModel(hf, tokenizer=tokenizer)


def remote_model(repository: str, revision: str | None, tokenizer: Any) -> Any:
    """A model hosted at NDIF under nnsight: its modules without weights, by which traces name what they read.

    Raises:
        InputError: its configuration cannot be read, or is of no causal language model.
    """
    from nnsight import TransformersModel

    try:
        return TransformersModel(repository, revision=revision, task="text-generation", tokenizer=tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read the configuration of {repository}: {_one_line(error)}") from None


def require_key() -> None:
    """Refuse to go to NDIF without a key; the key is read where the user put it, and kept nowhere else.

    Raises:
        InputError: there is none.
    """
    from nnsight import CONFIG

    # Read from the environment by nnsight only when it is imported.
    CONFIG.API.APIKEY = os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY
    CONFIG.APP.REMOTE_LOGGING = False
    if not CONFIG.API.APIKEY:
        raise InputError("NDIF wants a key: set NDIF_API_KEY, or give yours once to `nnsight login`")


def require_hosted(repository: str, revision: str | None) -> None:
    """Refuse a model that is not running at NDIF.

    Raises:
        InputError: no key, or the model is not there now. RimError: the service cannot be reached.
    """
    require_key()
    from nnsight import CONFIG, ndif

    with contextlib.redirect_stderr(io.StringIO()):  # nnsight prints what is told below
        deployed = ndif.status(raw=True).get("deployments")
    if deployed is None:
        raise RimError(f"NDIF cannot be reached at {CONFIG.API.HOST}: check the network, or try again later")
    running = [one for one in deployed.values() if one.get("application_state") == "RUNNING"]
    wanted = (repository.lower(), revision or "main")
    if not any((one["repo_id"].lower(), one.get("revision") or "main") == wanted for one in running):
        names = ", ".join(sorted({one["repo_id"] for one in running})) or "none"
        raise InputError(
            f"{repository} is not running at NDIF now; these are: {names}; choose one, or load the model without remote"
        )


@contextlib.contextmanager
def remote_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong in a trace at NDIF, as one line without the key."""
    from nnsight import CONFIG

    try:
        yield
    except Exception as error:
        told = _one_line(error).replace(CONFIG.API.APIKEY or "\0", "***")
        raise RimError(f"NDIF did not do the work on {name}: {told}; try again, or see its status page") from None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A traceback from there ends with what happened.
    return lines[-1][:300] if lines else type(error).__name__


class Remote:
    """A model hosted at NDIF. `layout` is that of its modules, which have no weights here; `name` is for messages.

    Attributes:
        dtype: the numbers it computes in there, known after the first reading.
    """

    def __init__(self, repository: str, revision: str | None, tokenizer: Any) -> None:
        self.name, self.tokenizer = repository, tokenizer
        self.wrapped = remote_model(repository, revision, tokenizer)
        self.layout = find_layout(self.wrapped._module)
        self._paths = {module: path for path, module in self.wrapped._module.named_modules()}
        self.dtype = torch.float32

    def passes(
        self, ids: Sequence[Sequence[int]], sites: Sequence[str], picked: list[int] | int | None
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows and their activations by site, float32 `[row, (position,) layer, ...]`, a request at a time."""
        n_layers = len(self.layout.layers)
        for rows in batches([len(row) for row in ids], TOKENS):
            inputs = self._inputs([ids[row] for row in rows])
            found = self._read(inputs, sites, slice(None) if picked is None else picked)
            axis = 1 if isinstance(picked, int) else 2
            stacked = {
                site: torch.stack([found[site, layer].float() for layer in range(n_layers)], dim=axis) for site in sites
            }
            if picked is None:
                for values in stacked.values():
                    values[inputs["attention_mask"] == 0] = 0.0
            if "head_z" in sites:
                stacked["head_z"] = stacked["head_z"].unflatten(-1, (self.layout.n_heads, self.layout.head_dim))
            yield rows, stacked

    def states(self, ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The last layer's output where each row's last `lengths` tokens are predicted, `[n, d]`, and those tokens."""
        last, columns = len(self.layout.layers) - 1, slice(-max(lengths) - 1, -1)
        found = self._read(self._inputs(ids), ("resid_post",), columns, [last])["resid_post", last]
        kept = [row[-n:] for row, n in zip(found, lengths, strict=True)]
        return torch.cat(kept), torch.tensor([t for row, n in zip(ids, lengths, strict=True) for t in row[-n:]])

    def read_out(self, h: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """What the model would answer from streams `h` `[n, d_model]`.

        Of `tokens` `[n, k]` logit, log-probability and rank (0 is the top), `[n, k]`; entropy in nats, `[n]`.
        """
        layout, a_token = self.layout, self._inputs([[0]])
        parts = [self._envoy(module) for module in (layout.layers[-1], layout.final_norm, layout.lm_head)]
        rows = max(1, _LOGITS // layout.d_vocab)
        with remote_errors(self.name):
            found = _trace_readout(
                self.wrapped, a_token, parts, h.to(self.dtype), tokens, layout.logit_scale, layout.soft_cap, rows
            )
        return dict(zip(("logit", "log_probability", "rank", "entropy"), found, strict=True))

    def checks(self) -> checks.Checks:
        """The identities that the remote tools rest on, measured there on two short prompts by three requests."""
        ids = encode(self.tokenizer, checks.PROBE_TEXTS)
        short, last = min(ids, key=len), len(self.layout.layers) - 1
        sites = ("resid_pre", "attn_added", "mlp_added", "resid_post")
        found = self._read(self._inputs([short]), sites, slice(None), logits=True)
        self.dtype = found["resid_post", last].dtype
        both = self._read(self._inputs(ids), (), slice(-len(short), None), logits=True)
        # Enough of the vocabulary to tell, and few enough to send.
        tokens = torch.linspace(0, self.layout.d_vocab - 1, 64).long()
        logits = found["logits", 0][0].float()
        factors = (1.0, self.layout.residual_multiplier, self.layout.residual_multiplier, 1.0)
        read = self.read_out(found["resid_post", last][0, -1:], tokens[None])["logit"]
        errors = {
            "residual_sum": max(
                checks.residual_error(*(found[site, layer] * times for site, times in zip(sites, factors, strict=True)))
                for layer in range(last + 1)
            ),
            "lens": checks.relative(read[0], logits[-1, tokens]),
            "padding": checks.relative(both["logits", 0][ids.index(short)], logits),
        }
        return checks.Checks.of(errors, checks.tolerance(self.dtype))

    def _read(
        self,
        inputs: dict[str, Tensor],
        sites: Sequence[str],
        columns: Any,
        layers: Sequence[int] | None = None,
        logits: bool = False,
    ) -> dict[tuple[str, int], Tensor]:
        """Each site of each layer as it is there, `[row, (position,) width]`, and the model's own logits."""
        layout, reads = self.layout, []
        for layer in range(len(layout.layers)) if layers is None else layers:
            for site in _IN_ORDER:
                if site in sites:
                    plain = site.replace("_added", "_out")
                    norm = None if plain == site else layout.norm_after(plain, layer)
                    module, inside = (norm, False) if norm is not None else layout.point(plain, layer)
                    reads.append(((site, layer), inside, self._envoy(module)))
        if logits:
            reads.append((("logits", 0), False, self.wrapped))
        with remote_errors(self.name):
            found = _trace_sites(self.wrapped, inputs, [read[1:] for read in reads], columns)
        return {key: values for (key, _, _), values in zip(reads, found, strict=True)}

    def _inputs(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return pad_left(ids, self.tokenizer.pad_token_id or 0)

    def _envoy(self, module: torch.nn.Module) -> Any:
        return self.wrapped.get(self._paths[module])


def _trace_sites(model: Any, inputs: dict[str, Tensor], reads: list[tuple[bool, Any]], columns: Any) -> list[Tensor]:
    with model.trace(**inputs, use_cache=False, remote=_MODE):
        found: Any = []
        for inside, envoy in reads:
            value = envoy.input if inside else envoy.output
            value = value.logits if hasattr(value, "logits") else value[0] if isinstance(value, tuple) else value
            # Cloned: some families add to a module's output in place afterwards.
            found.append(value[:, columns].detach().clone().cpu())
        saved = found.save()
    return list(saved)


def _trace_readout(
    model: Any,
    inputs: dict[str, Tensor],
    parts: list[Any],
    h: Tensor,
    tokens: Tensor,
    scale: float,
    soft_cap: float | None,
    rows: int,
) -> list[Tensor]:
    with model.trace(**inputs, use_cache=False, remote=_MODE):
        layer, norm, head = parts
        like = layer.output
        like = like[0] if isinstance(like, tuple) else like
        found: Any = [[], [], [], []]
        for start in range(0, len(h), rows):
            logits = head(norm(h[start : start + rows].to(like.device, like.dtype))) * scale
            logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.detach().float()
            wanted = tokens[start : start + rows].to(logits.device)
            named = logits.gather(1, wanted)
            log_p = logits.log_softmax(1)
            ranks = [(logits > named[:, k : k + 1]).sum(1) for k in range(named.shape[1])]
            found[0].append(named.cpu())
            found[1].append(log_p.gather(1, wanted).cpu())
            found[2].append(torch.stack(ranks, 1).float().cpu())
            found[3].append(-(log_p.exp() * log_p).sum(1).cpu())
        joined: Any = [torch.cat(part) for part in found]
        saved = joined.save()
    return list(saved)
