"""The package's public names: each resolves, and no submodule's import can shadow one."""

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import rim_core as rim


def test_every_name_resolves():
    for name in rim.__all__:
        assert getattr(rim, name) is not None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("logit_lense", "did you mean 'logit_lens'"),
        ("run_with_hooks", "that is rim.edit here"),
        ("HookedTransformer", "that is rim.load here"),
        ("activation_patching", "that is rim.patch here"),
        ("cohens_d", "that is rim.stats.cohens_d$"),
        ("using", "that is model.using"),
        ("zzzzqq", "has no 'zzzzqq'$"),
    ],
)
def test_an_unknown_name_gets_a_hint(name, hint):
    with pytest.raises(AttributeError, match=hint) as caught:
        getattr(rim, name)
    assert not hasattr(rim, f"__{name}__")
    assert "\n" not in str(caught.value)


def test_what_other_libraries_call_it_is_told_by_a_public_name():
    one_level_down = {"charts.save"}
    assert set(rim._ELSEWHERE.values()) <= set(rim._PUBLIC) | one_level_down
    assert all(callable(attrgetter(name)(rim)) for name in one_level_down)
    assert not set(rim._ELSEWHERE) & set(rim.__all__)


def test_no_public_name_is_a_submodule_s():
    """Importing `rim_core.x` sets the attribute x of the package, which would then be the module."""
    package = Path(rim.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {p.name for p in package.iterdir() if p.is_dir()}
    assert not modules & set(rim._PUBLIC)


def test_importing_the_package_loads_nothing_heavy():
    heavy = "('torch', 'altair', 'transformers', 'scipy')"
    code = f"import sys, rim_core; from rim_core import checking; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
