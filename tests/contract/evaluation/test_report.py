"""The HTML report: one file, no request, everything escaped, deterministic, no plot without data."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dmoa.errors import ConfigError
from dmoa.evaluation import figures as display
from dmoa.evaluation import report as plots
from dmoa.evaluation.answer_matrix import ORACLE
from dmoa.evaluation.records import BenchmarkInfo
from dmoa.evaluation.report import render_report, write_report
from dmoa.evaluation.results import Evaluation, build_evaluation
from dmoa.testing import answered as answer
from dmoa.testing import failed as lost
from dmoa.testing import run_info as run_of
from dmoa.testing import scored as score
from dmoa.workflows.console import print_routing
from tests.unit.run_records import small_run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """What is on a page: elements, their attributes, the text of table cells; fails on elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, *beginning: str) -> list[str]:
        return next(row for row in self.rows if row[: len(beginning)] == list(beginning))


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return build_evaluation(*small_run())


@pytest.fixture(scope="module")
def text(evaluation: Evaluation) -> str:
    return render_report(evaluation)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_requested_and_nothing_runs(page: Page, text: str) -> None:
    assert {"script", "link", "iframe", "object", "embed", "form", "base", "img", "image"} & set(page.elements) == set()
    assert [a for a in page.attributes if a[1].startswith("on")] == []
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith("#") for value in references)
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value and name == "content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_what_models_and_errors_say_is_text(text: str, page: Page) -> None:
    assert "<script" not in text
    assert page.row("mmlu/test/0003", "dmoa")[2] == "DeadlineError: <script>alert('x')</script> & so on"


def test_every_table_of_results_has_its_labels(page: Page, text: str) -> None:
    tables = [row for row in page.rows if row and row[0] in ("MMLU1", "relay2,3")]
    # Results and details for both policies, and the comparison, each for two benchmarks.
    assert len(tables) == 9
    assert page.row("relay2", "dmoa", "single")
    assert text.count("a generated letter instead of 5-shot scoring</li>") == 3
    assert text.count(f"{display.GENERATED}</li>") == 3


def test_figures_are_those_of_the_result(page: Page) -> None:
    row = page.row("MMLU1", "dmoa", "4")
    assert row[3:9] == ["50.0", "[15.0, 85.0]", "25.0", "2", "1", "1"]
    # Newcombe by hand: phi is 0, the Wilson intervals are [15.0, 85.0] and [4.6, 69.9].
    assert page.row("MMLU1", "dmoa", "single")[3:7] == ["4", "+25.0", "[-32.0, +65.5]", "1.000"]


def test_how_to_repeat_is_there(text: str) -> None:
    for part in ("dmoa evaluate --benchmarks mmlu,relay --seed 7 --out DIR", "a" * 64, "f" * 64, "ray 2.60.0", "max_steps 3"):
        assert part in text


@pytest.mark.contract
def test_the_same_result_gives_the_same_page(evaluation: Evaluation, text: str) -> None:
    code = (
        "import sys\nfrom dmoa.evaluation.report import render_report as render\nfrom dmoa.evaluation.results import Evaluation\n"
        "sys.stdout.reconfigure(encoding='utf-8')\nprint(render(Evaluation.model_validate_json(sys.stdin.read())), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=evaluation.model_dump_json().encode(), capture_output=True, check=True, timeout=120
    )
    assert done.stdout.decode() == text


def test_the_report_is_written_whole(evaluation: Evaluation, text: str, tmp_path: Path) -> None:
    write_report(evaluation, tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == text
    assert len(list((tmp_path / "deep").iterdir())) == 1
    with pytest.raises(ConfigError, match="a folder; expected a file"):
        write_report(evaluation, tmp_path)


def test_an_unfinished_run_says_so(evaluation: Evaluation) -> None:
    run = evaluation.config.model_copy(update={"gate_version": "untrained-1"})
    found = render_report(
        build_evaluation(run, [answer("mmlu", 0, "dmoa", gate_version="untrained-1")], [score("mmlu", 0, "dmoa", 1.0)])
    )
    assert "13 of 14 rows are still missing" in found
    assert "Gate untrained-1 is untrained: its routing is arbitrary" in found
    assert display.MISSING in found


# Plots


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_plots_are_well_formed_with_names_in_them(evaluation: Evaluation) -> None:
    drawn = plots.accuracy_against(evaluation)
    assert drawn is not None
    assert {"mmlu", "relay (generated)", "dmoa", "single"} <= set(texts_of(drawn))
    grouped = plots.groups(evaluation, "mmlu")
    assert grouped is not None
    assert {"art (2)", "law (2)"} <= set(texts_of(grouped))


def test_heat_maps_give_the_share_of_steps(evaluation: Evaluation) -> None:
    drawn = plots.routing(evaluation, "dmoa")
    assert drawn is not None
    found = texts_of(drawn)
    # adder in both steps, echo in the first of two: 50 % by benchmark; 100 % of first steps by step.
    assert found.count("50") == 2
    assert found.count("100") == 5
    assert {"adder", "echo", "mmlu", "relay"} <= set(found)


def test_the_page_shows_whom_the_gate_asks_before_and_after_training_first(text: str) -> None:
    assert (
        text.index("<h2>Whom the gate asks</h2>")
        < text.index("<h2>Steps</h2>")
        < text.index("<h2>Routing of the other policies</h2>")
    )
    assert display.gate_policies(before_and_after()) == ["dmoa", "dmoa:trained"]


def before_and_after() -> Evaluation:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2)], ["dmoa:trained", "dmoa", "single:adder", "single:echo"])
    run = run.model_copy(update={"gate_version": "untrained-1", "gates": {"trained": "abc"}})
    asked = {"dmoa:trained": ("adder",), "dmoa": ("adder", "echo"), "single:adder": ("adder",), "single:echo": ("echo",)}
    lines = [answer("gsm8k", n, policy, active=(agents,)) for policy, agents in asked.items() for n in range(2)]
    scores = [score("gsm8k", n, policy, float("echo" not in policy)) for policy in asked for n in range(2)]
    return build_evaluation(run, lines, scores)


def test_the_terminal_shows_whom_the_gate_asks_as_well() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_routing(before_and_after(), console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["adder", "100", ">", "100"] in lines
    assert ["echo", "100", ">", "0"] in lines
    assert "dmoa (untrained gate) > dmoa:trained" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_best_single_agent_and_the_oracle_are_marked() -> None:
    evaluation = before_and_after()
    drawn = plots.accuracy_against(evaluation)
    assert drawn is not None
    assert texts_of(drawn).count("best single") == 1
    assert "oracle" not in texts_of(drawn)
    rows = [row.model_copy(update={"policy": ORACLE}) if row.policy == "dmoa" else row for row in evaluation.rows]
    run = evaluation.config.model_copy(
        update={"policies": [p for p in evaluation.config.policies if p != "dmoa"], "derived": [ORACLE]}
    )
    drawn = plots.accuracy_against(evaluation.model_copy(update={"rows": rows, "config": run}))
    assert drawn is not None
    assert "oracle" in texts_of(drawn)


def test_an_agent_that_is_never_asked_has_its_row(evaluation: Evaluation) -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=1)], ["single"])
    drawn = plots.routing(build_evaluation(run, [answer("gsm8k", 0, "single", active=(("adder",),))], []), "single")
    assert drawn is not None
    assert "echo" in texts_of(drawn)


def test_a_plot_without_data_is_not_drawn() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=2)], ["dmoa"])
    empty = build_evaluation(run, [], [])
    assert plots.accuracy_against(empty) is None
    assert (plots.groups(empty, "gsm8k"), plots.steps(empty), plots.stop_reasons(empty)) == (None, None, None)
    assert plots.routing(empty, "dmoa") is None
    all_failed = render_report(
        build_evaluation(run, [lost("gsm8k", 0, "dmoa")], [score("gsm8k", 0, "dmoa", 0.0, is_failed=True, is_scored=False)])
    )
    assert "<h2>Whom the gate asks</h2>" not in all_failed
    assert "<svg" not in render_report(empty)


def test_odd_names_are_drawn_as_they_are() -> None:
    run = run_of([BenchmarkInfo(name="gsm8k", rows=4)], ["single:a_1.b"])
    lines = [answer("gsm8k", n, "single:a_1.b", active=((r"$\frac{1}{0}$ <b>",),)) for n in range(2)]
    scores = [score("gsm8k", n, "single:a_1.b", 1.0, group=f"_{n} & <i>$x$") for n in range(2)]
    evaluation = build_evaluation(run, lines, scores)
    routing, groups = plots.routing(evaluation, "single:a_1.b"), plots.groups(evaluation, "gsm8k")
    assert routing is not None
    assert groups is not None
    assert r"$\frac{1}{0}$ <b>" in texts_of(routing)
    assert "_0 & <i>$x$ (1)" in texts_of(groups)
    assert "<b>" not in routing


def test_ids_of_a_page_are_unique(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert used <= set(ids)


def test_colours_are_the_pages_own(text: str) -> None:
    defined = set(re.findall(r"(--[a-z0-9-]+):", text[: text.index("</style>")]))
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert used <= defined
    svg = text[text.index("<svg") : text.rindex("</svg>")]
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", svg)) == set()


def test_fifty_seven_subjects_get_room() -> None:
    run = run_of([BenchmarkInfo(name="mmlu", rows=57)], ["dmoa", "single"])
    scores = [score("mmlu", n, policy, 1.0, group=f"subject {n:02}") for n in range(57) for policy in run.policies]
    drawn = plots.groups(build_evaluation(run, [], scores), "mmlu")
    assert drawn is not None
    height_points = float(ET.fromstring(drawn).attrib["height"].removesuffix("pt"))
    # At least 12 points for each subject: labels of 8 points do not touch.
    assert height_points > 57 * 12
    assert len([name for name in texts_of(drawn) if name.startswith("subject")]) == 57


# What comes first, and what tells methods apart


METHODS = ("dmoa", "dmoa:trained", "dense", "random", *(f"single:a{number}" for number in range(12)))


def compared(methods: Sequence[str] = METHODS, **changes: Any) -> Evaluation:
    """One row a method on two benchmarks, those of even place right; `dmoa` by an untrained gate."""
    infos = [BenchmarkInfo(name=name, rows=1) for name in ("gsm8k", "svamp")]
    answered, scored = [], []
    for info in infos:
        for number, method in enumerate(methods):
            version = {"dmoa": "untrained-1", "dmoa:trained": "abc"}.get(method)
            answered.append(answer(info.name, 0, method, gate_version=version, prompt_tokens=100 + number))
            scored.append(score(info.name, 0, method, float(number % 2 == 0)))
    return build_evaluation(
        run_of(infos, methods, gate_version="untrained-1", gates={"trained": "abc"}, **changes), answered, scored
    )


@pytest.fixture(scope="module")
def compared_text() -> str:
    return render_report(compared())


def test_drawings_come_before_tables_and_comparisons_are_folded(compared_text: str) -> None:
    found = compared_text
    assert found.index("<svg") < found.index("All benchmarks together</h2>") < found.index("Results by benchmark</h2>")
    assert found.index("Whom the gate asks</h2>") < found.index("Results by benchmark</h2>")
    folded = re.findall(r"<details>(.*?)</details>", found, re.DOTALL)
    (comparisons,) = [text for text in folded if "<th>test</th>" in text]
    assert comparisons.count("<tr") == 1 + 2 * 120
    assert "<summary>240 comparisons of two policies" in comparisons
    assert found.count("<th>test</th>") == 1
    assert '<td class="name">random</td><td class="name">single:a3</td>' not in re.sub(
        r"<details>.*?</details>", "", found, flags=re.DOTALL
    )


def test_the_overall_table_has_every_method_once(compared_text: str) -> None:
    page = Page(compared_text)
    head = page.row("policy", "all rows %")
    assert head[:5] == ["policy", "all rows %", "95 %", "gsm8k", "svamp"]
    assert page.row("dense", "100.0")[1:5] == ["100.0", "[34.2, 100.0]", "100.0", "100.0"]
    assert page.row("random", "0.0")[5:] == ["1.50", "113", "2", "0"]
    assert len([row for row in page.rows if row and row[0].split(" (")[0] in METHODS]) == len(METHODS)


def test_a_method_that_did_not_run_has_no_mean_and_no_mark() -> None:
    found = compared(("dense", "single:b"))
    run = found.config
    answered = [answer(name, 0, "dense") for name in ("gsm8k", "svamp")] + [answer("gsm8k", 0, "single:b")]
    answered.append(lost("svamp", 0, "single:b", "EngineError: gone"))
    scored = [score(name, 0, policy, 1.0) for name, policy in (("gsm8k", "dense"), ("svamp", "dense"), ("gsm8k", "single:b"))]
    scored.append(score("svamp", 0, "single:b", 0.0, is_scored=False, is_failed=True))
    text = render_report(build_evaluation(run, answered, scored))
    assert Page(text).row("single:b", "-")[1:5] == ["-", "", "100.0", "did not run"]
    assert "Did not run: single:b on svamp: all 1 queries failed." in text


def test_an_untrained_gate_is_called_untrained_wherever_it_is_named(compared_text: str) -> None:
    found = compared()
    assert display.untrained_policies(found) == {"dmoa"}
    page = Page(compared_text)
    cells = [cell for row in page.rows for cell in row]
    assert "dmoa" not in cells
    assert cells.count("dmoa (untrained gate)") > 4
    drawn = plots.accuracy_against(found)
    assert drawn is not None
    assert {"dmoa (untrained gate)", "dmoa:trained"} <= set(texts_of(drawn))


def test_sixteen_methods_differ_in_colour_and_without_it_in_marker() -> None:
    found = compared([f"method-{number}" for number in range(16)])
    looks = [plots._marker(found, policy, size=6.0) for policy in found.config.all_policies]
    assert len({look["color"] for look in looks}) == 16
    assert len({(look["marker"], look["markerfacecolor"] == "none") for look in looks}) == 16
    drawn = plots.accuracy_against(compared())
    assert drawn is not None
    assert set(re.findall(r"--series-(\d+)", drawn)) == {str(number) for number in range(16)}
    assert set(METHODS) - {"dmoa"} <= set(texts_of(drawn))


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}


def linear(colour: str) -> Any:
    value = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Any) -> Any:
    """Source: Ottosson, A perceptual color space for image processing (2020)."""
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_are_told_apart_and_stand_off_the_page(text: str, scheme: str, deficiency: str) -> None:
    part = text.split("prefers-color-scheme: dark")[scheme == "dark"]
    page = re.findall(r"--page: (#[0-9a-f]{6})", part)[0]
    colours = re.findall(r"--series-\d+: (#[0-9a-f]{6})", part)[:16]
    assert len(set(colours)) == 16
    seen = [oklab(DEFICIENCIES[deficiency] @ linear(colour)) for colour in colours]
    # Two colours 0.02 apart in OKLab are just told apart side by side.
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.05
    light = np.array([0.2126, 0.7152, 0.0722])
    for colour in colours:
        low, high = sorted((float(light @ linear(colour)), float(light @ linear(page))))
        assert (high + 0.05) / (low + 0.05) >= 3.0


def test_long_names_get_room_and_stay_apart() -> None:
    names = [f"single:{'x' * 30}{number}{'y' * 30}" for number in range(3)]
    drawn = plots.accuracy_against(compared(names))
    assert drawn is not None
    assert set(names) <= set(texts_of(drawn)), "cut at both ends they would be one"
    drawn = plots.accuracy_against(compared([f"single:{number}-{'x' * 60}" for number in range(16)]))
    assert drawn is not None
    assert max(map(len, texts_of(drawn))) <= 48
    few = plots.accuracy_against(compared(["a", "b"]))
    assert few is not None
    heights = [float(ET.fromstring(text).attrib["height"].removesuffix("pt")) for text in (drawn, few)]
    assert heights[0] > heights[1] + 14 * 12, "sixteen long names stand one below the other"


# Words


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (4_570_000, "4.57M"),
        (2e9, "2.00G"),
    ],
)
def test_counts_keep_three_figures(number: float, shown: str) -> None:
    assert display.count(number) == shown


def test_other_words() -> None:
    assert (display.p_value(0.0004), display.p_value(0.0321)) == ("< 0.001", "0.032")
    assert (display.duration(8.34), display.duration(744), display.duration(11_160)) == ("8.3 s", "12.4 min", "3.1 h")
    assert (display.decimals(None), display.decimals(1.005, 1)) == ("-", "1.0")
    assert (display.points(0.051), display.ends(0.1, 0.25), display.share(0.625)) == ("+5.1", "[10.0, 25.0]", "62.5")
