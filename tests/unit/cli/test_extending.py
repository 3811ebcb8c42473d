"""The examples of `docs/extending.md`, run exactly as they are shown; what a broken one says; and who cannot name a file."""

from __future__ import annotations

import json
import pickle
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import dmoa as package
from dmoa.config import Config, load
from dmoa.engine_options import ENGINES
from dmoa.errors import ConfigError, PluginError, RequestError
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.evaluation.data import load_rows, prepare_rows
from dmoa.evaluation.records import EvaluateOptions, Reply
from dmoa.evaluation.registry import OpenScorers, build_scorer, expand_names, judging
from dmoa.evaluation.run_folder import RunFolder
from dmoa.policies.registry import POLICIES, build_policy
from dmoa.testing import scripted_pool
from dmoa.workflows.backends import OpenPool
from dmoa.workflows.evaluate import check_policies
from tests.unit.serving.fake_service import QUESTION, FakeService, connect, make_app

pytestmark = pytest.mark.contract  # runs the examples of the guide

TEXT = (files("dmoa") / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
CAPITALS = {"France": "Paris", "Peru": "Lima", "Chad": "N'Djamena"}


pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A folder with every example, and rows for the benchmark."""
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = tmp_path / "rows" / "capitals"
    rows.mkdir(parents=True)
    lines = [json.dumps({"country": country, "capital": capital}) + "\n" for country, capital in CAPITALS.items()]
    (rows / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def plugin(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_example_is_short() -> None:
    assert set(BLOCKS) == {"review.py", "shout.py", "pool.yaml", "capitals.py"}
    for name, text in BLOCKS.items():
        assert len(text.splitlines()) <= 40, name


def test_a_policy_of_a_file_answers(dmoa: Any, pool: Path, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    found = dmoa("run", "What is 12 + 7?", "--config", pool, "--policy", "review.py:Review", "--json", "reply.json")
    assert found.exit_code == 0, found.stderr
    reply = json.loads((shown / "reply.json").read_text(encoding="utf-8"))
    asked = [[agent["name"] for agent in step["agents"] if agent["status"] == "ok"] for step in reply["dmoa"]["steps"]]
    assert asked == [["adder", "guesser", "echo"], ["adder"]]
    assert reply["dmoa"]["policy"] == "review"
    assert reply["answer"] == "The answer is 19."


def test_a_worker_is_told_where_a_policy_lies(shown: Path, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    names = POLICIES.resolve(("dmoa", "review.py:Review"), "--policies")
    assert names == ("dmoa", "review")
    where = POLICIES.references(names)
    assert where == (f"{shown / 'review.py'}:Review",)
    del POLICIES["review"]  # as in a process that has not seen the file
    monkeypatch.chdir("/")
    open_pool = OpenPool(config_json=load(pool).model_dump_json(), policy_files=where)
    pickle.loads(pickle.dumps(open_pool))()
    assert "review" in POLICIES


def test_an_engine_of_a_file_runs_a_pool(dmoa: Any, shown: Path) -> None:
    args = ("run", "hello there", "--policy", "single", "--config", shown / "pool.yaml", "--json", shown / "reply.json")
    found = dmoa(*args)
    assert found.exit_code == 0, found.stderr
    assert json.loads((shown / "reply.json").read_text(encoding="utf-8"))["answer"] == "HELLO THERE?!"


def test_the_pool_keeps_the_absolute_path_of_its_engine(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(shown / "pool.yaml")
    assert config.llms["voice"].engine == f"{shown / 'shout.py'}:Shout"
    monkeypatch.chdir("/")
    del ENGINES["shout"]
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("llms.voice.engine_kwargs.pitch=3", r"engine_kwargs: pitch: unknown key .* expected one of mark"),
        ("llms.voice.model=scripted:x", r"engine 'shout' runs models shout:NAME, and no other engine does"),
        ("llms.voice.engine=shout.py:Loud", r"llms.voice: engine: .*shout.py' has no Loud"),
        ("llms.voice.engine=none.py:Shout", r"llms.voice: engine: cannot load .*none.py:Shout': FileNotFoundError"),
        ("llms.voice.engine=scripted", r"model is 'shout:any'; expected embedded:NAME"),
        ("llms.voice.engine=shot", r"llms.voice.engine is 'shot'; expected 'transformers'"),
    ],
)
def test_a_bad_engine_is_refused_when_the_pool_is_read(shown: Path, change: str, said: str) -> None:
    if "engine=scripted" in change:
        with pytest.raises(ConfigError, match=said):
            load(shown / "pool.yaml", [change, "llms.voice.engine_kwargs={}"])
        return
    with pytest.raises(ConfigError, match=said):
        load(shown / "pool.yaml", [change])


def test_a_benchmark_of_a_file_passes_its_self_check(dmoa: Any, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    args = ("evaluate", "--selfcheck", "--benchmarks", "capitals.py:CapitalRow", "--data-dir", "rows", "--json", "found.json")
    found = dmoa(*args)
    assert found.exit_code == 0, found.stdout + found.stderr
    (check,) = json.loads((shown / "found.json").read_text(encoding="utf-8"))["benchmarks"]
    assert (check["name"], check["passed"], check["rows"]) == ("capitals", True, {"test": 3})


def test_a_measure_that_no_score_has_fails_the_self_check(dmoa: Any, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    text = (shown / "capitals.py").read_text(encoding="utf-8")
    (shown / "capitals.py").write_text(
        text.replace("{VALUE: key(label)}", '{VALUE: key(label), "f1": key(label)}'), encoding="utf-8"
    )
    found = dmoa("evaluate", "--selfcheck", "--benchmarks", "capitals.py:CapitalRow", "--data-dir", "rows")
    assert found.exit_code == 1
    assert re.search(r"right answers: f1\s+NO\s+0 of 3", found.stdout)


def test_rows_of_a_file_are_asked_and_judged_in_another_process(shown: Path) -> None:
    names = expand_names([f"{shown / 'capitals.py'}:CapitalRow"])
    assert names == ("capitals",)
    assert "capitals" not in expand_names(["all"])
    folder = RunFolder(shown / "run")
    options = EvaluateOptions.parse({"benchmarks": "capitals", "data_dir": shown / "rows"})
    assert prepare_rows(folder, "capitals", options).rows == 3
    labels = {label.gold["capital"]: label for label in folder.read_gold("capitals")}
    scorers = OpenScorers(names=names, files=BENCHMARKS.references(names))
    del BENCHMARKS["capitals"]
    score = pickle.loads(pickle.dumps(scorers))()["capitals"]
    assert score(labels["Lima"], Reply(text="It is Lima.")).value == 1.0
    assert score(labels["Paris"], Reply(text="Lyon")).value == 0.0
    assert not score(labels["Paris"], Reply(text="")).is_scored


@pytest.mark.parametrize("name", ["words", "suites"])
def test_a_benchmark_of_ones_own_takes_no_name_of_a_suite(name: str, tmp_path: Path) -> None:
    text = f"""
from dmoa import benchmark
from dmoa.evaluation.benchmarks.base import BENCHMARKS
from dmoa.evaluation.benchmarks.word_problems import Gsm8kRow

@benchmark("{name}", title="Mine", scoring=BENCHMARKS["gsm8k"].scoring)
class Mine(Gsm8kRow):
    pass
"""
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"--benchmarks: @benchmark\('{name}'\): dmoa's own generated rows have that name"):
        expand_names([f"{tmp_path / 'mine.py'}:Mine"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    words = ", '    {}["x"]\n    words = ', r"the scorer, of capitals/test/\w+, raised KeyError\('x'\); mend it"),
        (
            "value=float(",
            "value=2 * float(",
            r"the scorer gave capitals/test/\w+ Score\(value=2.0,.*expected a Score with a value from",
        ),
        ("extracted=words[-1])", "extracted=len(words))", r"the scorer gave .*extracted a text or None"),
        ("extracted=words[-1])", 'metrics={"f1": float("nan")})', r"the scorer gave .*finite metrics"),
        (
            'return Score(value=float(words[-1].strip(".") == key(label)), extracted=words[-1])',
            "return 1.0",
            r"the scorer gave .* 1.0;",
        ),
        (
            "chance=lambda labels: chance_of([key(label) for label in labels])",
            "chance=lambda labels: 1 / 0",
            "chance raised ZeroDiv",
        ),
        (
            "chance=lambda labels: chance_of([key(label) for label in labels])",
            "chance=lambda labels: 2",
            "chance gave 2; expected a",
        ),
        ("{VALUE: key(label)}", '{"f1": key(label)}', r"gold_replies gave \{'f1': 'paris'\}; expected a text for 'value'"),
        ("{VALUE: key(label)}", "None", "gold_replies gave None; expected"),
        (
            'gold_of(label, "capital")[0].lower()',
            '[gold_of(label, "capital")[0].lower()]',
            r"answer_key gave \['paris'\]; expected",
        ),
        ('deviation=""', "deviation=None", r"its scoring is ScorerEntry\(.*deviation of it texts"),
        ("extracted=words[-1])", "metrics={1: 0.5})", r"the scorer gave .*finite metrics"),
        ("extracted=words[-1])", 'is_scored="no")', r"the scorer gave .*expected a Score"),
        (
            "    def gold(self)",
            "    def group(self):\n        return 5\n\n    def gold(self)",
            r"TypeError\(.group\(\) gave 5; expected",
        ),
        (
            "lambda allow_weak_sandbox: SCORING",
            "lambda allow_weak_sandbox: score",
            r"its scoring is <function score.*a ScorerEntry",
        ),
        ("self.country", "self.land", r"capitals/test.jsonl, line 1: reading the row raised AttributeError"),
        (
            'return {"capital": self.capital}',
            "return self.capital",
            r"capitals/test.jsonl, line 1: reading the row raised TypeError\(.gold\(\) gave '\w+'; expected a mapping",
        ),
        (
            'return f"Name the capital',
            'f"Name the capital',
            r"line 1: reading the row raised TypeError\(.text\(\) gave None; expected a text.\); mend it",
        ),
    ],
)
def test_a_mistake_of_a_benchmark_is_one_message(old: str, new: str, said: str, tmp_path: Path, shown: Path) -> None:
    path = shown / "capitals.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    (name,) = expand_names([f"{path}:CapitalRow"])

    def use() -> None:
        label = load_rows(name, "test", data_dir=shown / "rows").rows[0].label
        judge, entry = judging(name), build_scorer(name)
        entry.answer_key(label)
        entry.gold_replies(label)
        judge.score(label, Reply(text="It is Paris."))
        judge.chance([label])

    with pytest.raises(PluginError, match=rf"benchmark 'capitals' \(.*capitals.py:CapitalRow\): .*{said}"):
        use()


def test_a_policy_of_a_file_may_have_parameters(tmp_path: Path) -> None:
    text = """
from dmoa import policy
from dmoa.policies.options import PolicyOptions

class Options(PolicyOptions):
    k: int = 1

@policy("mine", "x.", options=Options)
class Mine:
    name = "mine"
"""
    path = plugin(tmp_path, text)
    given = (f"{path}:Mine:k=3:adder", "dmoa", f"{path}:Mine", "knn_router:data=a.py:k=3")
    assert POLICIES.resolve(given, "--policies") == ("mine:k=3:adder", "dmoa", "mine", "knn_router:data=a.py:k=3")
    check_policies(("mine:k=3:adder",), scripted_pool(("adder", "echo")))


def test_a_row_of_a_benchmark_of_a_file_is_explained(dmoa: Any, shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    named = ("--benchmarks", "capitals.py:CapitalRow", "--data-dir", "rows", "--reply", "It is Lima.", "--json", "found.json")
    expand_names(["capitals.py:CapitalRow"])
    row = next(row for row in load_rows("capitals", "test", data_dir=Path("rows")).rows if "Peru" in row.task.text)
    del BENCHMARKS["capitals"]  # as in the process of a command
    found = dmoa("evaluate", "--explain", row.task.row_id, *named)
    assert found.exit_code == 0, found.stdout + found.stderr
    assert json.loads((shown / "found.json").read_text(encoding="utf-8"))[0]["verdict"] == "right"


def test_a_benchmark_without_a_hub_says_where_rows_are_needed(shown: Path) -> None:
    expand_names([f"{shown / 'capitals.py'}:CapitalRow"])
    with pytest.raises(ConfigError, match="capitals: its rows are on no hub; give the folder of its rows with --data-dir"):
        prepare_rows(RunFolder(shown / "run"), "capitals", EvaluateOptions.parse({"benchmarks": "capitals"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", r"--policy: cannot load '.*mine.py:Mine': ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"--policy: cannot load .* SystemExit: 3"),
        ("class Mine: pass", r"--policy: '.*mine.py:Mine': does not stand under @policy"),
        ("x = 1", r"--policy: '.*mine.py' has no Mine"),
        ("from dmoa import policy\n@policy('dmoa', 'x')\nclass Mine: pass", r"@policy\('dmoa'\) in .*mine.py: the name is taken"),
        ("from dmoa import policy\n@policy('a/b', 'x')\nclass Mine: pass", r"@policy\('a/b'\): a name has 1-64 lower case"),
    ],
)
def test_a_broken_file_gives_one_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        POLICIES.load(f"{plugin(tmp_path, text)}:Mine", "--policy")


PACKAGE = """
from dmoa import policy
print("imported")
@policy("{name}", "From a package.")
class Mine:
    name = "{name}"
"""


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, text: str) -> Any:
    """A registry as a process has it in which a package with the entry point `extra` is installed."""
    info = folder / f"{module}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[dmoa.policies]\nextra = {module}:Mine\n", encoding="utf-8")
    plugin(folder, text, f"{module}.py")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(vars(POLICIES), "_installed", raising=False)
    return POLICIES


def test_a_package_is_imported_when_its_name_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dmoa: Any) -> None:
    found = installed(tmp_path, monkeypatch, "extra_good", PACKAGE.format(name="extra"))
    assert list(found)[-1] == "extra"
    assert "extra" in found
    assert "extra_good" not in sys.modules
    assert found["extra"].summary == "From a package."
    assert "From a package." in dmoa("policies").stdout


def test_a_broken_package_is_named_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dmoa: Any) -> None:
    found = installed(tmp_path, monkeypatch, "extra_bad", "import no_such_thing_at_all")
    said = r"entry point 'extra' of group 'dmoa.policies' \(extra_bad:Mine\): cannot be loaded: ModuleNotFoundError"
    with pytest.raises(ConfigError, match=said):
        found["extra"]
    shown = dmoa("policies")
    assert shown.exit_code == 0
    assert "entry point 'extra'" in shown.stdout
    assert "Every agent of the pool at every step." in shown.stdout


def test_a_package_whose_two_names_differ_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed(tmp_path, monkeypatch, "extra_odd", PACKAGE.format(name="other"))
    with pytest.raises(ConfigError, match="leads to 'other'; the two names must agree"):
        found["extra"]


async def test_a_client_can_name_no_file(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"open({str(mark)!r}, 'w').close()"
    reference = f"{plugin(tmp_path, text, 'x.py')}:Mine"
    service = FakeService(policies=tuple(POLICIES))
    async with connect(make_app(service)) as client:
        ask: dict[str, Any] = {"messages": QUESTION, "model": f"tiny/{reference}"}
        assert (await client.post("/v1/chat/completions", json=ask)).status_code == 404
        short = {"model": "tiny", "messages": QUESTION, "dmoa": {"policy": "x.py:Mine"}}
        assert (await client.post("/v1/chat/completions", json=short)).status_code == 400
    with pytest.raises(RequestError, match="is not known"):
        build_policy(reference, None)  # type: ignore[arg-type]
    assert service.asked == []
    assert not mark.exists()


def test_public_names_are_there() -> None:
    names = ("policy", "engine", "benchmark", "load_pool", "Swarm", "Query", "Answer")
    assert [getattr(package, name).__name__ for name in names] == list(names)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing
