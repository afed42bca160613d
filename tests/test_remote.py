"""Models at NDIF: the remote path as nnsight simulates it (all but the network), against the local tools."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import tiny_project
import torch
from families import load_tiny
from nnsight import CONFIG
from serving import Handler, serving

import rim_core as rim
import rim_core.models.loading
from rim_core.errors import InputError, RimError
from rim_core.models import remote
from rim_core.models.model import Model

TEXTS = ["How do I bake bread now?", "Explain the tides to a child in two sentences.", "Why?"]
ANSWERS = [" Use flour", " The moon", " It scatters"]
KEY = "a-key-of-mine"
NO_KEY = {"NDIF_API_KEY": "", "NNSIGHT_CONFIG": "no-such-file"}


class Service(Handler):
    """Tells which models run."""

    def respond(self) -> None:
        one = {"repo_id": "owner/hosted", "revision": "main", "application_state": "RUNNING"}
        self.answer(json.dumps({"deployments": {"a": {**one, "deployment_level": "HOT"}}}).encode())


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(Service) as where:
        monkeypatch.setattr(CONFIG.API, "HOST", where)
        monkeypatch.setenv("NDIF_API_KEY", KEY)
        yield where


def test_a_model_that_does_not_run_there_is_told_with_those_that_do(service: str) -> None:
    remote.require_hosted("Owner/Hosted", None)
    with pytest.raises(InputError, match="owner/other is not running at NDIF now; these are: owner/hosted;"):
        rim.load("owner/other", quantization=None, remote=True)


def test_without_a_key_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(InputError, match="set NDIF_API_KEY"):
        rim.load("owner/name", quantization=None, remote=True)


def test_a_service_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(RimError, match=r"NDIF cannot be reached at http://127\.0\.0\.1:9"):
        rim.load("owner/name", quantization=None, remote=True)
    assert capfd.readouterr() == ("", "")


def test_a_failure_there_is_one_line_without_the_key(service: str) -> None:
    remote.require_key()
    with (
        pytest.raises(RimError, match=r"work on owner/hosted: no, \*\*\* is not allowed;") as told,
        remote.remote_errors("owner/hosted"),
    ):
        raise RuntimeError(f"Traceback\n  somewhere\nno, {KEY} is not allowed")
    assert KEY not in str(told.value)


NOTEBOOK = """
import rim_core as rim
model = rim.load(f"{suite}:base", quantization=None if quantization == "none" else quantization)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tiny_project.make(tmp_path / "project")
    (root / "far.yml").write_text("base: {hub: owner/other}\nroles:\n  base: {}\n", encoding="utf-8")
    parameters = 'suite: str = "far"\nquantization: str = "nf4"'
    tiny_project.write(root, "one/01_first", NOTEBOOK, parameters=parameters)
    return root


def test_a_remote_run_is_kept_apart_and_needs_a_key(project: Path) -> None:
    local, far = (
        json.loads(tiny_project.rim(project, "run", "--plan", "--suite", "far.yml", *more).stdout)[0]
        for more in ((), ("--remote",))
    )
    assert far["overrides"] == {"quantization": "none", "remote": "NDIF"}
    assert far["run_key"] != local["run_key"]
    assert far["variant"] != local["variant"]
    done = tiny_project.rim(project, "run", "--remote", "--suite", "far.yml", **NO_KEY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rim: NDIF wants a key: set NDIF_API_KEY, or give yours once to `nnsight login`\n"
    assert not (project / "results").exists()


def test_a_remote_run_reaches_the_service_from_the_notebook(project: Path, service: str) -> None:
    told = {"NDIF_API_KEY": KEY, "NDIF_HOST": service}
    done = tiny_project.rim(project, "run", "--remote", "--suite", "far.yml", **told)
    assert done.returncode == 1
    assert "owner/other is not running at NDIF now; these are: owner/hosted" in done.stderr
    assert not any(KEY in path.read_text() for path in project.rglob("*") if path.is_file())


# --- nnsight's simulation -----------------------------------------------------------------------------


def simulate(patch: pytest.MonkeyPatch, here: Model) -> None:
    """Whatever is asked for is hosted, by a model in this process that nnsight's simulation sends traces to."""
    hosting = nnsight.TransformersModel(here.hf, tokenizer=here.tokenizer)
    patch.setattr(remote, "_MODE", "local")
    patch.setattr(remote, "require_hosted", lambda *_: None)
    patch.setattr(remote, "remote_model", lambda *_: hosting)
    patch.setattr(rim_core.models.loading, "_tokenizer", lambda *_: here.tokenizer)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Model]]:
    here = load_tiny(request.param)
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch, here)
        yield here, rim.load(f"tiny/{request.param}", quantization=None, remote=True)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["last", "all", [-2, -1]])
def test_activations_are_those_of_the_local_capture(pair: tuple[Model, Model], positions: Any) -> None:
    here, there = pair
    names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_z", "mlp_neurons")
    wanted, found = (rim.capture(model, TEXTS[:2], names, positions=positions) for model in pair)
    for site in names:
        same(found[site], wanted[site])
    assert there.n_heads == here.n_heads
    assert "at NDIF" in repr(there)


def test_a_cached_capture_asks_once(pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIM_CACHE", str(tmp_path))
    found = rim.capture(pair[1], TEXTS, "head_z", cache=True)["head_z"]
    monkeypatch.setattr(remote, "_trace_sites", None)
    same(rim.capture(pair[1], TEXTS, "head_z", cache=True)["head_z"], found)


def test_lens_and_likelihoods_are_the_local_ones(pair: tuple[Model, Model]) -> None:
    here, there = pair
    for positions in ("last", "all"):
        wanted, found = (rim.logit_lens(model, TEXTS, [5, 6], positions=positions) for model in pair)
        for name in ("logit", "log_probability", "rank"):
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5, equal_nan=True
            )
    a, b = (rim.log_likelihood(model, TEXTS, ANSWERS) for model in (there, here))
    same(a.log_probability, b.log_probability)
    same(a.entropy, b.entropy)


def test_identities_are_measured_there(pair: tuple[Model, Model]) -> None:
    there = pair[1]
    assert set(there.checks) == {"residual_sum", "lens", "padding"}
    assert all(check.holds and check.error < 1e-5 for check in there.checks.values())


@pytest.mark.parametrize(
    "tool",
    [
        lambda m: rim.generate(m, TEXTS),
        lambda m: rim.patch(m, TEXTS, TEXTS, "heads", rim.Projection(torch.ones(m.d_model))),
        lambda m: rim.attribution_patch(m, TEXTS, TEXTS, "heads", rim.Projection(torch.ones(m.d_model))),
        lambda m: rim.steer(m, torch.ones(m.d_model), [0]).__enter__(),
        lambda m: rim.ablate(m, heads=[(0, 0)], mode="zero").__enter__(),
        lambda m: rim.knock_out(m, "last", [-2]).__enter__(),
        lambda m: rim.head_contributions(m, TEXTS, torch.ones(m.d_model)),
        lambda m: rim.direct_logit_attribution(m, TEXTS, [5], [6]),
        lambda m: rim.per_example_gradients(m, TEXTS, ANSWERS),
        lambda m: rim.attention_patterns(m, TEXTS),
        lambda m: rim.unembedding_direction(m, [5], [6]),
        lambda m: rim.refusal_log_odds(m, TEXTS, [5, 6]),
        lambda m: rim.kl_divergence(m, None, TEXTS, ANSWERS),
        lambda m: m.using("some-adapter").__enter__(),
    ],
)
def test_what_cannot_run_there_says_so_in_one_line(pair: tuple[Model, Model], tool: Any) -> None:
    with pytest.raises(InputError, match="cannot run at NDIF, where only capture, logit_lens, log_likelihood") as told:
        tool(pair[1])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({}, "nothing is packed at NDIF; load with quantization=None"),
        ({"quantization": None, "dtype": "float16"}, "NDIF decides on dtype and device"),
        ({"quantization": None, "device_map": "auto"}, "NDIF decides on dtype and device"),
        ({"ref": "smollm2:base", "quantization": None}, "not on the hub"),
        ({"ref": "smollm2:risky", "quantization": None}, "is an adapter"),
        ({"ref": "./here", "quantization": None}, "not on the hub"),
    ],
)
def test_what_cannot_be_had_there_is_refused_before_a_request(call: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        rim.load(**{"ref": "owner/name", **call}, remote=True)
