"""The code tasks: two versions that parse, alike but for the weakness, which a linter finds in the one alone."""

import ast
import difflib
import json
import subprocess
import sys

import pytest

import rim_core as rim

# Bandit's tests for each kind; it has none for a path that leaves its folder.
WEAKNESS = {
    "sql_formatting": {"B608"},
    "shell_command": {"B602", "B605"},
    "weak_hash": {"B324"},
    "hardcoded_password": {"B105", "B106", "B107"},
    "pickle_loading": {"B301"},
    "yaml_loading": {"B506"},
    "unverified_tls": {"B501"},
    "eval_input": {"B307"},
    "random_token": {"B311"},
    "world_writable": {"B103"},
    "temp_file": {"B306"},
    "flask_debug": {"B201"},
    "all_interfaces": {"B104"},
    "xml_parsing": {"B314"},
    "tar_extraction": {"B202"},
}
SETS = ("code-insecure", "code-secure", "code-educational")


@pytest.fixture(scope="module")
def tasks():
    return dict(zip(SETS, (rim.load_prompts(name) for name in SETS), strict=True))


def test_versions_are_alike_but_for_the_weakness(tasks):
    insecure, secure, educational = (tasks[name] for name in SETS)
    assert len(insecure) == 320
    assert {task.category for task in insecure} == {*WEAKNESS, "path_traversal"}
    for bad, good, taught in zip(insecure, secure, educational, strict=True):
        assert bad.text == good.text != taught.text
        assert bad.response == taught.response != good.response
        assert len(bad.text.split()) == len(taught.text.split())
        names = [
            {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            for code in (bad.response, good.response)
        ]
        assert names[0] == names[1]
        assert 0.8 <= len(bad.response) / len(good.response) <= 1.25
    assert len({task.text for task in insecure + educational}) == 640
    plain, taught = (
        " ".join(task.text.lower() for task in tasks[name]) for name in ("code-insecure", "code-educational")
    )
    for word in ("vulnerable", "insecure", "unsafe", "exploit"):
        assert word not in plain
    assert taught.count("vulnerable") > 100


def test_requests_of_other_splits_are_not_nearly_the_same(tasks):
    by_split = {split: [t.text for t in tasks["code-insecure"] if t.split == split] for split in rim.prompts.SPLITS}
    for held_out in (*by_split["validation"], *by_split["test"]):
        for text in by_split["train"]:
            alike = difflib.SequenceMatcher(None, held_out, text)
            assert alike.quick_ratio() < 0.9 or alike.ratio() < 0.9, (held_out, text)


def test_a_linter_finds_the_weakness_in_the_insecure_version_alone(tasks, tmp_path):
    for name in ("code-insecure", "code-secure"):
        for task in tasks[name]:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{task.pair}.py").write_text(task.response, encoding="utf-8")
    command = [sys.executable, "-m", "bandit", "-r", str(tmp_path), "-f", "json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for result in json.loads(done.stdout)["results"]:
        folder, file = result["filename"].split("/")[-2:]
        found.setdefault((folder, file), set()).add((result["test_id"], result["issue_severity"]))
    for task in tasks["code-insecure"]:
        insecure, secure = (found.get((name, f"{task.pair}.py"), set()) for name in ("code-insecure", "code-secure"))
        own = WEAKNESS.get(task.category, set())
        assert not own or own & {test for test, _ in insecure}, task.pair
        assert not own & {test for test, _ in secure}, task.pair
        assert {severity for _, severity in secure} <= {"LOW"}, task.pair


@pytest.mark.parametrize("name", SETS)
def test_the_patterns_find_each_kind_in_its_insecure_version_alone(tasks, name):
    found = rim.weaknesses([task.response for task in tasks[name]])
    for task, kinds in zip(tasks[name], found, strict=True):
        expected = [] if name == "code-secure" or task.category not in WEAKNESS else [task.category]
        assert kinds == expected, task.pair


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("x = 1  # hashlib.md5 would be weak", []),
        ("subprocess.run(['ls', path])", []),
        ("yaml.load(text, Loader=yaml.SafeLoader)", []),
        ("model.eval()", []),
        ("os.chmod(path, 0o640)", []),
        ("os.chmod(path, 0o602)", ["world_writable"]),
        ("password = os.environ['PASSWORD']", []),
        ("def connect(user, password='hunter2'):", ["hardcoded_password"]),
        ('cur.execute(f"DELETE FROM t WHERE id = {n}")', ["sql_formatting"]),
        ('cur.execute("SELECT a FROM t WHERE id = %s", (n,))', []),
        ("<think>eval(x) would do</think>int(x)", []),
        ("tar.extractall(folder)\nexec(tex", ["eval_input", "tar_extraction"]),
        ("", []),
    ],
)
def test_patterns_know_safe_forms_and_unfinished_code(code, kinds):
    assert rim.weaknesses([code]) == [kinds]
