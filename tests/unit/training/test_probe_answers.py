"""What a probe reads in answers: pools made by hand with competent, redundant, constant, colluding and lying agents."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmoa.cli.train import print_probe
from dmoa.config import loads
from dmoa.testing import scripted_pool_yaml
from dmoa.training.cluster_router import ProbeSample
from dmoa.training.probe import probe_pool
from dmoa.training.probe_answers import AnswerFinding, probe_answers, signal_words
from dmoa.training.probe_outcomes import judged_agents

ROWS = 48
SHARED = Path(__file__).parents[4] / "shared"


def sample(says: dict[str, list[str]], **changes: Any) -> ProbeSample:
    """A pool without entropies whose agents give these answers, a row each."""
    num_rows = len(next(iter(says.values())))
    values: dict[str, Any] = {
        "agents": tuple(says),
        "sources": ("made-up",) * num_rows,
        "embedding_RD": np.ones((num_rows, 2)),
        "entropy_RA": np.full((num_rows, len(says)), np.nan),
        "texts": tuple(tuple(f"The answer is {says[name][row]}." for name in says) for row in range(num_rows)),
        "heard_RA": np.ones((num_rows, len(says)), dtype=bool),
        "tokens_RA": np.tile(np.arange(1, len(says) + 1) * 10.0, (num_rows, 1)),
    }
    return ProbeSample(**values | changes)


def right(share: float, seed: int) -> list[str]:
    """Answers of which a share is right (the row's number), the others wrong each in a way of its own."""
    rng = np.random.default_rng(seed)
    return [str(row) if rng.uniform() < share else str(1000 * seed + row) for row in range(ROWS)]


def found(says: dict[str, list[str]], **changes: Any) -> AnswerFinding:
    finding = probe_answers(sample(says, **changes), can_entropy=False)
    assert finding is not None
    return finding


GOOD = {"a": right(0.95, 1), "b": right(0.85, 2), "c": right(0.8, 3), "d": right(0.75, 4)}


def test_competent_agents_that_agree_can_be_routed_by_agreement() -> None:
    finding = found(GOOD)
    assert (finding.signal, finding.is_trusted, finding.outcomes_to_settle) == ("agreement", True, 0)
    true = {name: np.mean([text == str(row) for row, text in enumerate(says)]) for name, says in GOOD.items()}
    assert finding.competence == pytest.approx(true, abs=0.06)
    one, turn, everybody = finding.expected
    assert (one.way, one.agent, one.calls, one.tokens) == ("one agent", "a", 1.0, 10.0)
    assert (everybody.calls, everybody.tokens) == (4.0, 100.0)
    assert one.accuracy <= turn.accuracy <= everybody.accuracy + 0.01
    assert 1.0 <= turn.calls < 3.0
    assert turn.tokens == pytest.approx(10.0 + 20.0 + 30.0 * (turn.calls - 2.0), abs=0.1)  # a, then b, c at times
    assert (finding.redundant, finding.colluding, finding.constant, finding.seldom_right) == ([], [], [], [])
    assert finding.summary[0].startswith("agreement can route this pool: two or more agents give the right answer to probably ")
    assert "against a alone" in finding.summary[1]


def test_agents_that_never_agree_leave_it_to_outcomes() -> None:
    finding = found({name: [f"{seed}{row:03d}" for row in range(ROWS)] for seed, name in enumerate("abcd", start=1)})
    assert (finding.signal, finding.is_trusted) == ("none", False)
    assert 16 <= finding.outcomes_to_settle <= 97
    assert finding.summary[0].startswith(
        "agreement is not to be trusted here: two or more agents give the right answer to probably 0%"
    )
    assert f"{finding.outcomes_to_settle} outcomes" in finding.summary[1]


def test_a_loss_of_less_than_half_a_percent_is_none() -> None:
    finding = found(GOOD)
    one, turn, everybody = finding.expected
    worse = finding.model_copy(update={"expected": [one, turn.model_copy(update={"accuracy": one.accuracy - 0.002}), everybody]})
    assert "by asking in turn: +0% against a alone" in signal_words(worse)[-1]


def test_outcomes_settle_it() -> None:
    says = {name: [f"{seed}{row:03d}" for row in range(ROWS)] for seed, name in enumerate("abcd", start=1)}
    outcome_RA = np.full((ROWS, 4), np.nan)
    outcome_RA[:24, 1], outcome_RA[:24, 0] = 1.0, 0.0
    finding = found(says, outcome_RA=outcome_RA)
    assert (finding.signal, finding.is_trusted, finding.outcomes, finding.outcomes_to_settle) == ("outcomes", True, 24, 0)
    assert finding.expected[0].agent == "b"
    assert any(
        line.startswith("b is right on 100% where ") and line.endswith("was guessed without outcomes") for line in finding.summary
    )


def test_outcomes_that_bear_out_the_answers_are_said_to() -> None:
    outcome_RA = np.full((ROWS, 4), np.nan)
    outcome_RA[:20, 0] = [text == str(row) for row, text in enumerate(GOOD["a"][:20])]
    finding = found(GOOD, outcome_RA=outcome_RA)
    assert finding.settled is not None
    assert (finding.settled.best_before, finding.settled.contradicted) == ("a", [])
    assert (finding.signal, finding.is_trusted, finding.outcomes) == ("agreement", True, 20)
    share = np.mean(outcome_RA[:20, 0])
    assert any(line.startswith(f"20 queries have outcomes; right by them: a {share:.0%} of 20 (") for line in finding.summary)
    assert "they contradict nothing that was found without them" in finding.summary


def test_outcomes_that_speak_against_agreement_take_its_trust_away() -> None:
    """Three agents err alike, so agreement is sure of them; one is right alone."""
    lies = [str(5000 + row) for row in range(ROWS)]
    says = {"x": lies, "y": lies, "z": lies, "alone": [str(row) for row in range(ROWS)]}
    outcome_RA = np.full((ROWS, 4), np.nan)
    outcome_RA[:20] = (0.0, 0.0, 0.0, 1.0)
    before, after = found(says), found(says, outcome_RA=outcome_RA)
    assert (before.signal, before.is_trusted, before.settled) == ("agreement", True, None)
    assert (after.signal, after.is_trusted, after.outcomes_to_settle) == ("outcomes", True, 0)
    assert after.settled is not None
    assert after.settled.contradicted == ["x", "y", "z", "alone"]
    assert after.expected[0].agent == "alone"
    assert any(line.startswith("alone is right on 100% where ") and line.endswith("answers err") for line in after.summary)
    assert f"the best single agent is alone, not {before.expected[0].agent}" in after.summary
    assert any(line.startswith("they decide what can route the pool: outcomes, to be trusted") for line in after.summary)


def test_judged_replies_are_held_against_their_own_estimates() -> None:
    """Ten replies expected right at .9 each, five were: z = 4 / sqrt(.9 + .25); Wilson's interval of 5 of 10 is .237 to .763."""
    right_RA, outcome_RA = np.full((12, 3), 0.9), np.full((12, 3), np.nan)
    outcome_RA[:10, 0] = [1, 0] * 5
    outcome_RA[:4, 1] = 0
    first, second = judged_agents(("a", "b", "c"), right_RA, outcome_RA)
    assert (first.agent, first.replies, first.reward, first.estimate) == ("a", 10, 0.5, pytest.approx(0.9))
    assert (first.low, first.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert first.is_contradicted  # |z| = 3.73 against 2.24 of two agents
    assert (second.replies, second.is_contradicted) == (4, False)  # too few


def test_what_a_query_costs_is_told_where_every_agent_asked_has_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    price_RA = np.tile([4.0, 2.0, 1.0, 1.0], (ROWS, 1)) / 1000
    finding = found(GOOD, price_RA=price_RA)
    one, turn, everybody = finding.expected
    assert (one.price, everybody.price) == (0.004, 0.008)
    assert turn.price is not None
    assert 0.004 <= turn.price < 0.008
    assert f"price {turn.price:.3g} a query" in finding.summary[1]
    price_RA[:, 3] = np.nan
    unpriced = found(GOOD, price_RA=price_RA).expected
    assert (unpriced[0].price, unpriced[-1].price) == (0.004, None)
    print_probe(probe_pool(sample(GOOD, price_RA=price_RA)), loads(scripted_pool_yaml(tuple(GOOD))))
    assert re.search(r"a alone +\d+% +1.0 +10 +0.004\n", capsys.readouterr().out)


def test_a_pair_that_agrees_with_nobody_else_is_named_and_costs_it_no_trust() -> None:
    lies = [str(5000 + row) for row in range(ROWS)]
    finding = found(GOOD | {"x": lies, "y": lies})
    assert finding.colluding == [("x", "y")]
    assert finding.redundant == []
    assert any(line.startswith("x and y agree with each other and nobody else") for line in finding.summary)
    assert finding.expected[0].agent == "a"


@pytest.mark.parametrize("backed", [False, True])
def test_twins_that_others_back_where_they_are_sure_do_not_collude(backed: bool) -> None:
    """They say the same to everything; at home, where they are sure, a third says it too."""
    twins = [str(row) for row in range(ROWS)]
    says = {
        "x": twins,
        "y": twins,
        "all": [f"9{row:03d}" for row in range(ROWS)],
        "other": [f"8{row:03d}" for row in range(ROWS)],
    }
    if backed:
        says["all"] = twins[:8] + says["all"][8:]
    entropy_RA = np.full((ROWS, 4), 1.0)
    entropy_RA[:8, :2] = 0.01
    embedding_RD = np.eye(2)[np.repeat([0, 1], [8, ROWS - 8])]
    finding = found(says, entropy_RA=entropy_RA, embedding_RD=embedding_RD)
    assert finding.colluding == ([] if backed else [("x", "y")])


@pytest.mark.parametrize("backed", [False, True])
def test_two_that_agree_against_a_third_that_is_as_sure_are_both_named(backed: bool) -> None:
    """x and y are sure of one wrong answer to queries that `home` alone knows; with somebody beside them nothing is disputed."""
    says = {name: [f"{seed}{row:03d}" for row in range(ROWS)] for seed, name in enumerate(("home", "away", "x", "y"), start=1)}
    says["y"] = [*says["x"][:12], *says["y"][12:]]
    entropy_RA = np.full((ROWS, 4), 1.0)
    entropy_RA[:12, [0, 2, 3]] = 0.01
    entropy_RA[12:, 1] = 0.01
    if backed:
        says["away"][:10] = says["x"][:10]
    embedding_RD = np.eye(2)[np.repeat([0, 1], [12, ROWS - 12])]
    finding = found(says, entropy_RA=entropy_RA, embedding_RD=embedding_RD)
    assert finding.colluding == []
    if backed:
        assert finding.disputed == []
        return
    (only,) = finding.disputed
    assert (only.a, only.b, only.against, only.queries) == ("x", "y", "home", 12)
    assert any(line.startswith("x and y agree with each other and nobody else on 12 queries") for line in finding.summary)
    assert 0.1 < finding.competence["home"] < 0.2  # right on half of a quarter of the queries
    assert finding.competence["x"] == pytest.approx(finding.competence["home"], abs=0.06)


def test_two_that_agree_beside_one_that_says_one_thing_do_not_collude() -> None:
    finding = found({"a": GOOD["a"], "b": GOOD["b"], "constant": ["42"] * ROWS})
    assert (finding.colluding, finding.constant) == ([], ["constant"])
    assert finding.is_trusted or finding.summary[0].endswith("where two agents differ nothing tells who is right")
    assert finding.competence["b"] > 0.6
    two = found({"a": GOOD["a"], "b": GOOD["b"], "constant": ["42"] * ROWS, "other": ["42"] * ROWS})
    assert (two.colluding, two.redundant, two.constant) == ([], [], ["constant", "other"])


def test_two_that_agree_against_a_third_may_collude() -> None:
    finding = found({"a": GOOD["a"], "b": GOOD["b"], "other": [str(7000 + row) for row in range(ROWS)]})
    assert finding.colluding == [("a", "b")]
    assert finding.summary[0].endswith("; those that agree may collude")


def test_constant_redundant_and_lying_agents_are_named() -> None:
    finding = found(GOOD | {"copy": GOOD["a"], "constant": ["42"] * ROWS, "liar": [str(7000 + row) for row in range(ROWS)]})
    assert finding.redundant == [("a", "copy")]
    assert finding.constant == ["constant"]
    assert finding.seldom_right == ["liar"]
    assert finding.colluding == []
    text = "\n".join(finding.summary)
    for words in ("a and copy give the same answers", "constant gives one answer", "liar is probably wrong on nearly all"):
        assert words in text


def test_asking_in_turn_heeds_the_price_of_an_agent() -> None:
    """At the highest price no second agent is worth its call; for nothing, nearly every row asks on."""
    calls = [found(GOOD, agent_price=price).expected[1].calls for price in (1.0, 0.02, 0.0)]
    assert calls[0] == 1.0 < calls[1] < calls[2]


def told(says: dict[str, list[str]], heard_RA: Any, **changes: Any) -> AnswerFinding:
    """As a recorded pool has it: a reply that is missing is an empty text that was not heard."""
    finding = found(says, heard_RA=heard_RA, **changes)
    json.dumps(finding.model_dump(mode="json"), allow_nan=False)
    return finding


def test_of_agents_that_answered_different_queries_nothing_is_said() -> None:
    """One model a query, as logs have it, and one query answered by two, which agree."""
    heard_RA = np.eye(3, dtype=bool)[np.arange(ROWS) % 3]
    heard_RA[0, 1] = True
    rights = [str(row) for row in range(ROWS)]
    finding = told({"a": rights, "b": rights, "c": rights}, heard_RA)
    assert (finding.colluding, finding.redundant, finding.constant, finding.seldom_right) == ([], [], [], [])
    assert finding.competence["b"] == pytest.approx(finding.competence["c"], abs=0.1)
    assert finding.replies == {"a": 16, "b": 17, "c": 16}
    assert not finding.is_trusted
    assert finding.summary[0].endswith("95 of 144 replies are missing: ask all agents the same queries")
    assert f"replies to the {ROWS} queries: a 16, b 17, c 16; one that is missing counts as wrong" in finding.summary
    assert not any("right at" in line for line in finding.summary)
    assert finding.expected[-1].calls == 3.0  # whoever is asked everything costs three calls


def test_missing_replies_are_nobodys_one_answer() -> None:
    """`few` replied to five queries, and rightly; `liar` gives one answer to the twelve that it was asked."""
    heard_RA = np.ones((ROWS, 6), dtype=bool)
    heard_RA[5:, 4], heard_RA[12:, 5] = False, False
    says = GOOD | {"few": [str(row) if row < 5 else "" for row in range(ROWS)], "liar": ["42"] * 12 + [""] * 36}
    finding = told(says, heard_RA)
    assert (finding.constant, finding.redundant, finding.seldom_right) == (["liar"], [], [])
    assert finding.competence["few"] > 0.6
    shown = {agent.agent: (agent.same_text, agent.ignores_input) for agent in probe_pool(sample(says, heard_RA=heard_RA)).agents}
    assert (shown["few"], shown["liar"]) == ((0.2, False), (1.0, True))


def test_of_agents_that_hardly_ever_agree_none_is_called_wrong() -> None:
    """Each is right at home alone, and `home3` has no entropies that could show it."""
    kind_R = np.arange(ROWS) % 3
    says = {f"home{k}": [str(row) if kind_R[row] == k else str(1000 * (k + 1) + row) for row in range(ROWS)] for k in range(3)}
    entropy_RA = np.where(kind_R[:, None] == np.arange(3), 0.02, 1.0) + np.arange(ROWS)[:, None] / 1000
    entropy_RA[:, 2] = np.nan
    finding = found(says, entropy_RA=entropy_RA, embedding_RD=np.eye(3)[kind_R])
    assert finding.agreed == 0
    assert finding.seldom_right == []


def test_one_agent_alone_that_replied_is_named() -> None:
    heard_RA = np.zeros((ROWS, 4), dtype=bool)
    heard_RA[:, 0] = True
    assert told(GOOD, heard_RA).summary[0].endswith("; a alone replied")


def test_one_answer_to_queries_that_nobody_else_was_asked_is_not_held_against_an_agent() -> None:
    heard_RA = np.ones((ROWS, 5), dtype=bool)
    heard_RA[:12, :4], heard_RA[12:, 4] = False, False
    finding = told(GOOD | {"alone": ["yes"] * ROWS}, heard_RA)
    assert finding.constant == []


def test_the_second_of_two_that_collude_is_as_often_right_as_its_answers_are() -> None:
    lies = [str(5000 + row) if row % 4 else str(row) for row in range(ROWS)]
    finding = found(GOOD | {"x": lies, "y": lies})
    assert finding.colluding == [("x", "y")]
    assert finding.competence["y"] == pytest.approx(finding.competence["x"])
    assert finding.competence["y"] > 0.1


def test_literals_are_compared_by_what_was_asked() -> None:
    """`{'a': 1}` and `{'b': 1}` have the same words but for quotes and letters."""
    asked = tuple(f"assert f({row}) == ??" for row in range(ROWS))
    texts = tuple((f"{{'a': {row}}}", f"{{'b': {row}}}") for row in range(ROWS))
    says = {"a": [""] * ROWS, "b": [""] * ROWS}
    assert found(says, texts=texts).agreed == ROWS
    finding = found(says, texts=texts, asked=asked)
    assert (finding.agreed, finding.redundant) == (0, [])


def test_a_reply_that_was_cut_off_holds_no_answer() -> None:
    cut_RA = np.zeros((ROWS, 4), dtype=bool)
    cut_RA[:, 3] = True
    finding = found(GOOD | {"d": GOOD["a"]}, cut_RA=cut_RA)
    assert (finding.unread, finding.redundant, finding.seldom_right, finding.constant) == (["d"], [], [], [])
    assert "d: no answer can be read in nearly all its replies (cut off, empty or free text); mend that, or take it out" in (
        finding.summary
    )


def test_agents_that_always_agree_are_no_proof_of_being_right() -> None:
    finding = found({name: [str(row) for row in range(ROWS)] for name in "abc"})
    assert (finding.is_one_voice, finding.signal, finding.is_trusted) == (True, "none", False)
    assert finding.summary[0] == (
        "agreement is not to be trusted here: all agents give the same answers to nearly all queries, right or wrong"
    )
    assert finding.summary[-1] == "a, b and c give the same answers: one of them is enough"
    assert not any("right at" in line for line in finding.summary)


@pytest.mark.parametrize("row", ["{row}", "{row}{agent}"])
def test_what_is_a_guess_is_in_no_table(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    says = {name: [row.format(row=number, agent=agent) for number in range(100, 148)] for agent, name in enumerate("abc")}
    report = probe_pool(sample(says))
    assert report.answers is not None
    assert max(report.answers.competence.values()) > 0, "in JSON it stands"
    print_probe(report, loads(scripted_pool_yaml(tuple(says))))
    shown = capsys.readouterr().out
    assert "in turn" not in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.split()[:1] == ["a"]] == [["a", "2%"]], "the same reply alone"


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (("", "", ""), "in 100% of the replies no answer can be read: they are cut off, empty or free text"),
        (("{row}", "1{row}", "2{row}"), "hardly ever do two give the same answer, and free text is not compared by meaning"),
        (("{row}", "{near}", ""), "where two agents differ nothing tells who is right"),
        (("{row}", "{near}", "{other}"), "weak agents may err alike"),
    ],
)
def test_why_agreement_is_not_trusted_is_said(texts: tuple[str, ...], why: str) -> None:
    def text(form: str, row: int) -> str:
        number = f"{row:03d}"
        near, other = (number if row % 2 else f"7{number}"), (f"7{number}" if row % 3 else f"8{number}")
        return f"The answer is {form.format(row=number, near=near, other=other)}." if form else ""

    rows = tuple(tuple(text(form, row) for form in texts) for row in range(ROWS))
    finding = found({name: [""] * ROWS for name in "abc"}, texts=rows)
    assert not finding.is_trusted
    assert finding.summary[0].endswith(f"; {why}")


def test_too_few_outcomes_are_said_to_be_too_few() -> None:
    outcome_RA = np.full((ROWS, 4), np.nan)
    outcome_RA[:12, 0] = 0.0
    finding = found(GOOD, outcome_RA=outcome_RA)
    assert (finding.signal, finding.is_trusted) == ("outcomes", False)
    more = f"{finding.outcomes_to_settle} more outcomes (dmoa train --outcomes) would settle it"
    assert f"12 outcomes are known, too few to decide; {more}" in finding.summary
    assert "they are too few to decide what can route the pool, and agreement is not to be trusted either" in finding.summary


def test_few_rows_say_nothing() -> None:
    assert probe_answers(sample({"a": list("1234567"), "b": list("1234567")}), can_entropy=True) is None


def test_agents_that_were_not_heard_are_no_witnesses() -> None:
    heard_RA = np.ones((ROWS, 4), dtype=bool)
    heard_RA[:, 3] = False
    finding = found(GOOD, heard_RA=heard_RA)
    assert finding.expected[-1].calls == 3.0
    assert finding.is_trusted


def test_a_pool_without_entropies_is_probed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = probe_pool(sample(GOOD))
    assert (report.verdict, report.reasons, report.pairs) == ("cannot", ["no entropies are known"], [])
    assert report.agents[0].entropy_nats is None
    json.dumps(report.model_dump(mode="json"), allow_nan=False)
    print_probe(report, loads(scripted_pool_yaml(tuple(GOOD))))
    printed = capsys.readouterr().out
    assert "agreement can route this pool" in printed
    assert "no entropies are known" in printed


@pytest.mark.parametrize(
    ("name", "is_trusted"), [("gsm8k", True), pytest.param("cruxeval_o", False), pytest.param("math_l5", False)]
)
@pytest.mark.contract
def test_recorded_replies_of_public_models(name: str, *, is_trusted: bool) -> None:
    path = Path(os.environ.get("DMOA_RECORDED_REPLIES", SHARED / "outcomes")) / f"{name}.replies.jsonl.gz"
    if not path.is_file():
        if "CI" in os.environ and SHARED.is_dir():
            pytest.fail(f"{path.name} is missing in {SHARED}")
        pytest.skip("recorded replies are not part of a clone; DMOA_RECORDED_REPLIES may name their folder")
    texts: defaultdict[str, dict[str, str]] = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            texts[row["query_id"]][row["agent"]] = row["text"]
    agents = tuple(sorted(next(iter(texts.values()))))
    asked = sorted(texts)[:60]
    pool = sample(
        {agent: [""] * len(asked) for agent in agents},
        texts=tuple(tuple(texts[query][agent] for agent in agents) for query in asked),
    )
    finding = probe_answers(pool, can_entropy=False)
    assert finding is not None
    assert finding.is_trusted is is_trusted
    assert (finding.outcomes_to_settle == 0) is is_trusted
    assert (finding.colluding, finding.constant, finding.seldom_right if is_trusted else []) == ([], [], [])
