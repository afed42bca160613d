"""Parameters: read by their types, in their bounds, and refused in one line before a kernel starts."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_project
from tiny_project import rim, write

from companion import cli, notebooks, staleness
from companion.commands.run import _read_parameters
from rim_core import paths
from rim_core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = notebooks.names(ROOT)


def known(cell: str) -> dict[str, notebooks.Parameter]:
    return notebooks.parameters("one/01_first", tiny_project.notebook(parameters=cell))


def given(cell: str, **values: object) -> dict[str, object]:
    return notebooks.check_overrides("one/01_first", known(cell), values, ROOT)


@pytest.mark.parametrize(
    ("cell", "text", "value"),
    [
        ("p: int | None = 3", "none", None),
        ("p: int | None = 3", "4", 4),
        ("p: str | None = None", "x", "x"),
        ("p: bool = True", "False", False),
        ("p: tuple[int, ...] = ()", "[1, 2]", (1, 2)),
        ("p: list[float] = []", "[1]", [1.0]),
        ("p: Literal['nf4', 'int8'] = 'nf4'", "int8", "int8"),
        ("p: dict[str, int] = {}", '{"a": 1}', {"a": 1}),
        ("p: str = ''", "3", "3"),
        ("p: str = ''", "nan", "nan"),
        ("p: str = ''", '"quoted"', '"quoted"'),
        # In quotes, by their older names, and through a module's name.
        ('p: "int | None" = 3', "4", 4),
        ("p: List[int] = []", "[4]", [4]),
        ("p: typing.Union[int, str] = 3", "4", 4),
        ("p: Union[int, str] = 3", "four", "four"),
        ("p: Optional[float] = 1.0", "null", None),
        ("p: Tuple[int, str] = (1, 'a')", '[2, "b"]', (2, "b")),
        ("p: t.Dict[str, List[int]] = {}", '{"a": [1]}', {"a": [1]}),
        ("p = 3", "4", 4),
        ("p: float = 1", ".5", 0.5),
        ("p: float = 1", "1e-3", 0.001),
        ("p: int = 1", "+5", 5),
        ("p = None", "[1]", [1]),
        ("p: int = 1", np.int64(4), 4),
        ("p: list[int] = []", np.array([1, 2]), [1, 2]),
    ],
)
def test_a_text_is_read_by_the_parameter_s_type(cell, text, value):
    found = given(cell, p=text)
    assert found == {"p": value}
    assert type(found["p"]) is type(value)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("cell", "value", "words"),
    [
        ("p: int = 3", "3.0", "'3.0' is not of type int"),
        ("p: int = 3", True, "True is not of type int"),
        ("p: bool = True", "1", "'1' is not of type bool; write true or false"),
        ("p: list = []", "1,2", "'1,2' is not of type list; write it as JSON"),
        ("p: list[int] = []", "[1, 1.5]", "is not of type list.int."),
        ("p: Literal['a', 'b'] = 'a'", "c", "'c' is not of type Literal"),
        ('p: "int | None" = 3', "x", "'x' is not of type int | None"),
        ("p: list = []", "[NaN]", "holds NaN or infinity"),
        ("p: list = []", "[1e999]", "holds NaN or infinity"),
        ("p: dict = {}", '{"a": Infinity}', "holds NaN or infinity"),
        ("p: list = []", [float("nan")], "holds NaN or infinity"),
        ("p: list = []", DEEP, "nested too deeply"),
        ("p: list = []", "[" * 50 + "]" * 50, "nested too deeply"),
        ("p: str = ''", "\udc80", "half of a character"),
        ("p: list = []", [object()], "is no value that JSON can hold"),
        ("p: int = 3  # 1 to 9", "0", "'0' is not allowed; it must be 1 to 9"),
        ("p: int = 3  # 1 to 9", "10", "must be 1 to 9"),
        ("p: float = 0.3  # between 0 and 1", "1", "must be between 0 and 1"),
        ("p: float = 0.3  # above 0", "0", "must be above 0"),
        ("p: int = -1  # at most -1", "0", "must be at most -1"),
        ("p: str = 'a'  # one of a, b", "c", "'c' is not allowed; it must be one of a, b"),
        ("p: list[int] = [1]  # at least 0", "[1, -1]", "must be at least 0"),
        ("seeds: list = [0]", "[]", "seeds: none given; give at least one whole number"),
        ("seeds: list = [0]", "[0, 0, 0]", "0 stands twice"),
        ("seeds: list = [0]", "[1, 1.5]", "must be a whole number of at least 0, not 1.5"),
        ("seeds: list = [0]", "[true]", "must be a whole number of at least 0, not True"),
        ("seeds: list = [0]", "[-1]", "must be a whole number of at least 0, not -1"),
        ("data_file: str = ''", "no such file.csv", "there is no file 'no such file.csv' here"),
        ("source: str = 'harmful'", "gone.TSV", "there is no file 'gone.TSV' here"),
        ("data_file: str = ''", "x" * 300, "there is no file"),
        ("m: dict[str, str] = {}", '{"a": "x", "a": "y"}', "names 'a' twice; name each key once"),
        ("m: dict = {}", '{"b": [{"a": 1, "a": 1}]}', "names 'a' twice"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(cell, value, words):
    name = next(iter(known(cell)))
    with pytest.raises(InputError, match=words.replace("[", r"\[").replace("|", r"\|")) as caught:
        given(cell, **{name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).startswith(f"notebook one/01_first: parameter {name}: ")


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("p: Path = 'x'", "its type .Path. cannot be checked; Path is none; use int, float"),
        ("p: 'np.ndarray' = 3", "its type .np.ndarray. cannot be checked"),
        ("p: list[Thing] = []", "Thing is none"),
        ("p: __import__('os') = 3", "cannot be checked"),
        ("p: 'int |' = 3", "cannot be checked"),
        ("p: int = 2.5", "its default: 2.5 is not of type int"),
        ("p: list = [1e999]", "its default: .* holds NaN or infinity"),
        ("p: int = 0  # 1 to 9", "its default: 0 is not allowed; it must be 1 to 9"),
        ("p: int = 5  # 1 - 9", "'1 - 9' is no bound that can be checked"),
        ("p: int = 5  # at least one", "is no bound that can be checked"),
        ("seeds: list = []", "its default: none given; give at least one"),
        ("p: int = n", "its default is not a literal"),
    ],
)
def test_a_parameters_cell_that_cannot_be_checked_is_refused_when_read(cell, words):
    with pytest.raises(InputError, match=words) as caught:
        known(cell)
    assert "\n" not in str(caught.value)


def test_comments_are_help_and_bounds():
    found = known("# How many.\nn: int = 3  # 1 to 9\nm: int = 4  # the others\n# The last.\nk: int = 5")
    assert [p.help for p in found.values()] == ["How many.; 1 to 9", "the others", "The last."]
    assert [p.bounds is not None for p in found.values()] == [True, False, False]


def test_files_are_meant_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("prompt\nHi\n")
    monkeypatch.chdir(tmp_path)
    found = given("data_file: str = ''\nsource: str = 'harmful'", data_file="data.csv", source="./data.csv")
    assert found == {"data_file": str(tmp_path / "data.csv"), "source": str(tmp_path / "data.csv")}
    assert notebooks.files_of(found, ROOT) == dict.fromkeys(found, tmp_path / "data.csv")
    # Inside the project it is named from there, as the kernel finds it, whoever's folder the project is in.
    project = tiny_project.make(tmp_path / "project")
    (project / "mine").mkdir()
    (project / "mine" / "set.jsonl").write_text('{"prompt": "Hi"}')
    monkeypatch.chdir(project / "mine")
    inside = notebooks.check_overrides("x", known("a_file: str = ''"), {"a_file": "set.jsonl"}, project)
    assert inside == {"a_file": "mine/set.jsonl"}
    assert notebooks.files_of({**inside, "n": 3, "b_file": "", "c": "x.csv"}, project) == {
        "a_file": project / "mine" / "set.jsonl"
    }


FILES = [
    ("p: list[str] = []", ["harmful", "a.csv"], ["p[1]"], "p[1]"),
    ("p: tuple[str, ...] = ()", ["a.csv"], ["p[0]"], "p[0]"),
    ("p: dict[str, str] = {}", {"a": "a.csv", "b": "hub:x/y.csv"}, ["p['a']"], "p['a']"),
    ("p: dict = {}", {"a": [1, {"b": "a.csv"}, None]}, ["p['a'][1]['b']"], "p['a'][1]['b']"),
    ("p_file: list[str] = []", ["a.csv", "plain"], ["p_file[0]", "p_file[1]"], "p_file[0]"),
]


@pytest.mark.parametrize(("cell", "value", "places", "first"), FILES)
def test_files_named_within_a_value_are_found_checked_and_count_by_content(
    tmp_path, monkeypatch, cell, value, places, first
):
    monkeypatch.setenv("RIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name = next(iter(known(cell)))
    with pytest.raises(InputError, match=re.escape(f"parameter {first}: there is no file 'a.csv' here")):
        given(cell, **{name: value})
    for file in ("a.csv", "plain"):
        (tmp_path / file).write_text("prompt\nHi\n")
    found = given(cell, **{name: value})
    files = notebooks.files_of(found, ROOT)
    assert list(files) == places
    assert all(path.is_file() and path.is_relative_to(tmp_path) for path in files.values())
    before = staleness._by_content(ROOT, found)
    assert str(tmp_path) not in str(before)
    (tmp_path / "a.csv").write_text("prompt\nHo there\n")
    assert staleness._by_content(ROOT, found) != before


def test_a_text_alone_is_no_json_and_a_name_too_long_no_file():
    assert given("p: str = ''", p='{"a": 1, "a": 2}') == {"p": '{"a": 1, "a": 2}'}
    assert notebooks.files_of({"p": ["x" * 5000 + ".csv", "\0.csv"]}, ROOT) == {}


# --- the shipped notebooks and the command ----------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_of_a_shipped_notebook_has_bounds(name):
    found = notebooks.parameters(name, notebooks.read_source(ROOT, name))
    assert all(p.help for p in found.values())
    open_ended = [p.name for p in found.values() if p.type in ("int", "float") and p.bounds is None]
    assert open_ended == []
    assert found["quantization"].bounds


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        ("n_prompts=-1", "must be 4 to 240"),
        ("n_prompts=0", "must be 4 to 240"),
        ("n_prompts=100000", "must be 4 to 240"),
        ("test_size=2", "must be between 0 and 1"),
        ("quantization=bogus", "must be one of nf4, int8, none"),
        ("seeds=[]", "none given"),
        ("seeds=[0,0,0]", "0 stands twice"),
        (f"seeds={DEEP}", "nested too deeply"),
    ],
)
def test_rim_run_refuses_before_it_loads_a_model_or_starts_a_kernel(parameter, words, tmp_path):
    command = "import sys; from companion import cli; sys.modules['torch'] = None; cli.main()"
    arguments = ["run", "self_aware/01_linear_probes", "-p", parameter]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=ROOT,
        env=tiny_project.environment(RIM_CACHE=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"rim: notebook self_aware/01_linear_probes: parameter .*{words}.*\n", done.stderr)
    assert time.monotonic() - began < 20  # 1 s on an idle machine


def examples(*command: str) -> list[list[str]]:
    """The commands that a help text shows."""
    shown = subprocess.run(
        [sys.executable, "-m", "companion.cli", *command, "--help"],
        env={**tiny_project.environment(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  rim ")]
    return [shlex.split(re.split(r"\s{2,}", line)[0])[1:] for line in lines]


@pytest.mark.parametrize("command", [[], ["run"], ["book"], ["diff"]])
def test_examples_of_the_help_work(command):
    found = examples(*command)
    assert found
    for arguments in found:
        options = cli._parser().parse_args(arguments)
        overrides = _read_parameters(getattr(options, "parameters", []))
        for name in notebooks.resolve(ROOT, getattr(options, "notebooks", [])):
            notebooks.check_overrides(
                name, notebooks.parameters(name, notebooks.read_source(ROOT, name)), overrides, ROOT
            )
    assert any("-p" in arguments for arguments in found) or command in (["book"], ["diff"])


def test_what_a_run_writes_is_json(tmp_path):
    root = tiny_project.make(tmp_path / "project")
    write(root, "one/01_first", "print(1)", parameters="x: list = [1]\nsuite: str = 'tiny'\n")
    for value in ("[NaN]", "[1e999]", '[{"a": Infinity}]'):
        done = rim(root, "run", "--suite", "tiny.yml", "-p", f"x={value}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (root / "results").exists()
    assert paths.results_dir(root) == root / "results"
    assert json.dumps([1], allow_nan=False)
