"""Tools: the calculator against Python and against attacks, BM25 against its formula, and calls found in replies."""

import asyncio
import json
import math
import re
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.agents.tools import (
    Bm25Corpus,
    Calculator,
    Passage,
    Search,
    ToolCall,
    default_tools,
    find_call,
    instructions,
    result_text,
    stop_strings,
)
from dmoa.errors import ConfigError

TOOLS = ("calculator", "search")


def trees(operators: Sequence[str], largest: int) -> st.SearchStrategy[str]:
    """Return random arithmetic, fully parenthesised."""
    return st.recursive(
        st.integers(0, largest).map(str),
        lambda tree: st.tuples(tree, st.sampled_from(operators), tree).map(lambda parts: f"({' '.join(parts)})"),
        max_leaves=15,
    )


def calculate(expression: str) -> str:
    return asyncio.run(Calculator().run(expression))


class TestCalculator:
    @pytest.mark.parametrize(
        ("expression", "value"),
        [
            ("12*7", "84"),
            ("84/7", "12"),
            ("7/2", "3.5"),
            ("1/3", "0.333333333333"),
            ("0.1+0.2", "0.3"),
            ("7//2", "3"),
            ("7 % 4", "3"),
            ("2^10", "1024"),
            ("2**-2", "0.25"),
            ("-3**2", "-9"),
            ("(1+2)*-(3)", "-9"),
            ("1,200 + 34", "1234"),
            ("$1,234,567.50 × 2", "2469135"),  # noqa: RUF001
            ("12 ÷ 4 − 1", "2"),  # noqa: RUF001
            ("12 x 7 =", "84"),
            ("5 + 3 = ?", "8"),
            ("max(1,200)", "200"),
            ("sqrt(144)", "12"),
            ("round(2.567, 2)", "2.57"),
            ("round(7.6)", "8"),
            ("floor(-0.5) + ceil(0.5)", "0"),
            ("2*pi", "6.28318530718"),
            ("007 + 1", "8"),
            ("1e3", "1000"),
            ("10**30 / 10**29", "10"),
            ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
            ("\n 1 +\n 2 \n", "3"),
        ],
    )
    def test_values(self, expression: str, value: str) -> None:
        assert calculate(expression) == value

    @pytest.mark.parametrize(
        "expression",
        [
            "",
            " = ",
            "hello",
            "1/0",
            "5 % 0",
            "0**-1",
            "(-8)**0.5",
            "1 +",
            "1 2",
            "1,2",
            "1,20",
            "3(4)",
            "min()",
            "abs",
            "1e999",
            "٣ + 1",
            "True",
            "'a'*3",
            "[1]*3",
            "1 if 1 else 2",
            "1 < 2",
            "x = 3",
            "1; 2",
            "1\x00",
            "sqrt(-1)",
            "log(0)",
            "_ + 1",
            "1_000",
            "1j",
            "2or 3",
            "max(*(1,2))",
        ],
    )
    def test_what_has_no_value_is_an_error_text(self, expression: str) -> None:
        assert calculate(expression).startswith("error: ")

    @pytest.mark.parametrize(
        "expression",
        [
            "().__class__.__bases__[0].__subclasses__()",
            "(1).real",
            "lambda: 1",
            "(lambda: 1)()",
            "__import__('os')",
            "open('/etc/passwd')",
            "max.__self__",
            "[x for x in (1,)]",
            "f'{1}'",
            "sqrt.__call__(4)",
            "round(number=2)",
        ],
    )
    def test_nothing_but_arithmetic_is_reachable(self, expression: str) -> None:
        assert calculate(expression).startswith("error: only numbers")

    @pytest.mark.parametrize(
        "expression",
        [
            "9**9**9",
            "2**100000",
            "(10**1000)**1000",
            "10**100",
            "round(5, -1000000000)",
            "round(5.5, 1000000000)",
            "(" * 300 + "1" + ")" * 90,
            "1+" * 5000 + "1",
            "10**99*" * 50 + "1",
            "9" * 101,
        ],
    )
    def test_huge_work_is_refused_at_once(self, expression: str) -> None:
        started = time.perf_counter()
        assert calculate(expression).startswith("error: ")
        assert time.perf_counter() - started < 10.0, "the work was begun"

    @given(st.text() | st.text(alphabet="0123456789.,+-*/%()^ exabsqrtpi", max_size=60))
    def test_never_raises(self, expression: str) -> None:
        assert calculate(expression)

    @given(trees("+-*/", 999))
    def test_agrees_with_exact_arithmetic(self, expression: str) -> None:
        try:
            exact = eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})
        except ZeroDivisionError:
            assert calculate(expression) == "error: division by zero"
            return
        assert float(calculate(expression)) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)

    @given(trees(["+", "-", "*", "//", "%"], 99))
    def test_whole_numbers_agree_with_python_to_the_last_digit(self, expression: str) -> None:
        try:
            exact = eval(expression, {}, {})
        except ZeroDivisionError:
            assert calculate(expression) == "error: division by zero"
            return
        assert calculate(expression) == str(exact)

    @given(st.integers(0, 10**12), st.integers(0, 10**12))
    def test_thousands_separators(self, a: int, b: int) -> None:
        assert calculate(f"{a:,} + ${b:,}") == str(a + b)


PASSAGES = [
    Passage(title="Paris", text="Paris is the capital of France. Paris lies on the Seine."),
    Passage(title="Rome", text="Rome is the capital of Italy."),
    Passage(title="Bread", text="Bread is baked from flour."),
]


WORDS = st.sampled_from(["red", "green", "blue", "fish", "bird", "stone"])


def lucene_bm25(query: list[str], documents: list[list[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Score documents by the textbook formula with Lucene's inverse document frequency."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            with_word = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - with_word + 0.5) / (with_word + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores


class TestSearch:
    def search(self, query: str, k: int = 3) -> list[str]:
        return [passage.title for passage in Bm25Corpus(PASSAGES).search(query, k)]

    def test_ranks_by_the_words_in_common(self) -> None:
        assert self.search("What is the capital of Italy?") == ["Rome", "Paris"]
        assert self.search("BREAD") == ["Bread"]
        assert self.search("capital", k=1) == ["Rome"]  # the shorter of the two

    @given(st.lists(WORDS, min_size=1, max_size=4, unique=True), st.lists(st.lists(WORDS, min_size=1, max_size=9), min_size=1))
    def test_agrees_with_the_formula(self, query: list[str], documents: list[list[str]]) -> None:
        passages = [Passage(title=words[0], text=" ".join(words[1:])) for words in documents]
        found = Bm25Corpus(passages).search(" ".join(query), len(passages))
        scores = lucene_bm25(query, documents)
        score_of = {id(passage): score for passage, score in zip(passages, scores, strict=True)}
        assert [score_of[id(p)] for p in found] == pytest.approx(sorted((s for s in scores if s > 0), reverse=True), rel=1e-5)

    @pytest.mark.parametrize("query", ["", "the of is", "zzz", "?!", "\ud800"])
    def test_nothing_in_common_finds_nothing(self, query: str) -> None:
        assert self.search(query) == []

    def test_ties_keep_the_corpus_order(self) -> None:
        corpus = Bm25Corpus([Passage(title=str(i), text="same words here") for i in range(50)])
        assert [p.title for p in corpus.search("words", 5)] == ["0", "1", "2", "3", "4"]

    def test_the_tool_shows_passages(self) -> None:
        tool = Search(Bm25Corpus(PASSAGES))
        assert asyncio.run(tool.run("capital of Italy")).splitlines()[0] == "[Rome] Rome is the capital of Italy."
        assert asyncio.run(tool.run("zzz")) == "no passage matches"
        assert asyncio.run(tool.run(" ")).startswith("error: ")

    def test_a_passage_takes_one_line_of_bounded_length(self) -> None:
        tool = Search(Bm25Corpus([Passage(title="rye\nbread " * 100, text="rye\n" * 1000)]))
        found = asyncio.run(tool.run("rye"))
        assert found.startswith("[rye bread rye bread ")
        assert (len(found), found.count("\n")) == (703, 0)

    def test_without_a_corpus_the_tool_says_so(self) -> None:
        assert asyncio.run(default_tools()["search"].run("x")) == "error: this pool has no search corpus"

    def test_loads_json_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "corpus.jsonl"
        file.write_text("\n".join(json.dumps({"title": p.title, "text": p.text}) for p in PASSAGES) + "\n\n")
        assert asyncio.run(default_tools(file)["search"].run("flour")) == "[Bread] Bread is baked from flour."

    def test_passages_may_hold_any_line_separator(self, tmp_path: Path) -> None:
        file = tmp_path / "corpus.jsonl"
        file.write_text(json.dumps({"title": "Rye", "text": "rye\u2028bread\u0085here"}, ensure_ascii=False), encoding="utf-8")
        (found,) = Bm25Corpus.load(file).search("rye", 1)
        assert found.text == "rye\u2028bread\u0085here"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"title": "a", "text": "b"}\nnope', "line 2: not JSON"),
            ('{"title": "a"}', "line 1: text is 'None', must be a text"),
            ("[1]", "line 1: title is '\\[1\\]', must be a text"),
            ("", "no passage has a word"),
            ('{"title": "the", "text": "of"}', "no passage has a word"),
        ],
    )
    def test_a_bad_corpus_names_line_and_field(self, content: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "corpus.jsonl"
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Bm25Corpus.load(file)

    def test_a_missing_corpus_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read '.*nowhere\.jsonl'"):
            Bm25Corpus.load(tmp_path / "nowhere.jsonl")


class TestCalls:
    def test_the_prompt_and_the_stop_strings_name_the_tools(self) -> None:
        assert "<calculator>12*7</calculator>" in instructions(["calculator"])
        assert "<search>" not in instructions(["calculator"])
        assert "<search>" in instructions(TOOLS)
        assert instructions([]) == ""
        assert stop_strings(TOOLS) == ("</calculator>", "</search>")

    @pytest.mark.parametrize("closing", ["", "</calculator>", "</calculator> I"])
    def test_finds_a_call_with_and_without_its_closing_tag(self, closing: str) -> None:
        assert find_call("So <calculator>12*7" + closing, TOOLS) == ToolCall(
            tool="calculator", argument="12*7", before="So <calculator>12*7"
        )

    def test_an_answered_call_is_not_found_again(self) -> None:
        call = find_call("So <calculator>12*7", TOOLS)
        assert call is not None
        text = call.before + result_text(call, "84")
        assert text == "So <calculator>12*7</calculator> = 84\n"
        assert find_call(text, TOOLS) is None
        second = find_call(text + "and <search>Rome", TOOLS)
        assert second == ToolCall(tool="search", argument="Rome", before=text + "and <search>Rome")

    @pytest.mark.parametrize("text", ["", "12*7", "calculator", "<b>12</b>", "</calculator>", "<search>x</search>"])
    def test_other_text_is_no_call(self, text: str) -> None:
        assert find_call(text, ["calculator"]) is None
        assert find_call(text + "<calculator>1", []) is None

    @pytest.mark.parametrize(
        "result",
        [
            "try <calculator>9**9</calculator> or <search>y",
            "try <calc<search>ulator>9**9</calc</search>ulator>",
            "<py<py<search>thon>thon>print(1)",
        ],
    )
    def test_a_result_cannot_call_a_tool(self, result: str) -> None:
        call = ToolCall(tool="search", argument="x", before="<search>x")
        assert find_call(call.before + result_text(call, result), TOOLS) is None

    @given(st.text(), st.text())
    def test_every_call_ends_after_one_result(self, argument: str, result: str) -> None:
        call = find_call(f"<calculator>{argument}", TOOLS)
        assert call is not None
        assert find_call(call.before + result_text(call, result), TOOLS) is None
