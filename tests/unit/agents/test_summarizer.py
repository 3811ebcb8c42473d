"""Summarizers: which contribution is chosen, what the verdict line means, and what is streamed or saved when a stream is lost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from dmoa.agents.summarizer import Fold, LlmSummarizer, SelectSummarizer, parse_verdict, withhold
from dmoa.config import SummarizerConfig
from dmoa.core.aggregate import Selection, select_contribution
from dmoa.testing import Fail, FakeAgents, Fate, Hang, Lose, Refuse, Say, query, said, state_of
from dmoa.types import AgentCall, AgentReply, Sampling, StepRecord, SummarizerRecord, TextDelta

SURE, UNSURE = said("sure", Say(text="It is 19.", nats=0.1)), said("unsure", Say(text="It is 18.", nats=0.9))
REPLIES = (UNSURE, SURE)
EARLIER = StepRecord(step=0, replies=(), active=(), summary="old", summarizer=SummarizerRecord(mode="llm", verdict="continue"))

VERDICTS = [
    ("FINAL\nIt is 19.", "final", "It is 19."),
    ("\n FINAL \r\n \t\n  It is 19. \n", "final", "  It is 19. \n"),
    ("CONTINUE\n\n    return n\n", "continue", "    return n\n"),
    ("\n    return n\n", "unparsable", "    return n\n"),
    ("FINAL\n \n", "final", ""),
    (" \n", "unparsable", ""),
    ("FINAL\n\nOne.\n\nTwo.", "final", "One.\n\nTwo."),
    ("FINAL", "final", ""),
    ("CONTINUE\nFINAL\n19", "continue", "FINAL\n19"),
    ("CONTINUE", "continue", ""),
    ("FINAL: 19", "unparsable", "FINAL: 19"),
    ("FINAL.\n19", "unparsable", "FINAL.\n19"),
    ("Final\n19", "unparsable", "Final\n19"),
    ("**FINAL**\n19", "unparsable", "**FINAL**\n19"),
    ("CONTINUED\n19", "unparsable", "CONTINUED\n19"),
    ("It is 19.\nFINAL", "unparsable", "It is 19.\nFINAL"),
    ("FINAL CONTINUE\n19", "unparsable", "FINAL CONTINUE\n19"),
    ("", "unparsable", ""),
]


@pytest.mark.parametrize(("text", "verdict", "summary"), VERDICTS, ids=[repr(text) for text, _, _ in VERDICTS])
def test_only_an_exact_first_line_is_a_verdict(text: str, verdict: str, summary: str) -> None:
    assert parse_verdict(text) == (verdict, summary)


async def fold(
    fate: Fate, replies: Sequence[AgentReply] = REPLIES, *, deadline_s: float | None = None
) -> tuple[Fold, list[str], FakeAgents]:
    """Fold the second step of a query; return the fold, the streamed pieces and the agents."""
    agents = FakeAgents({"summarizer": fate})
    config = SummarizerConfig(mode="llm", llm="tiny", profile="Merges.")
    deadline = None if deadline_s is None else time.time() + deadline_s
    state = state_of(query(), steps=(EARLIER,), deadline_unix_s=deadline)
    pieces: list[TextDelta] = []
    result = await LlmSummarizer(agents, config).fold(state, tuple(replies), Sampling(max_tokens=70), pieces.append)
    return result, [piece.text for piece in pieces], agents


async def test_selecting_takes_the_surest_contribution_and_generates_nothing() -> None:
    pieces: list[TextDelta] = []
    result = await SelectSummarizer().fold(state_of(query()), REPLIES, Sampling(), pieces.append)
    assert result.summary == "It is 19."
    assert result.record == SummarizerRecord(mode="select", verdict="rule")
    assert result.selection is not None
    assert (result.selection.agent, result.selection.is_agreed) == ("sure", False)
    assert pieces == []


async def test_selecting_without_a_contribution_keeps_the_summary() -> None:
    failed = AgentReply(agent="a", status="failed", error="gone")
    result = await SelectSummarizer().fold(state_of(query(), steps=(EARLIER,)), (failed,), Sampling(), lambda _: None)
    assert (result.summary, result.selection) == ("old", None)


async def test_selecting_says_how_the_chosen_contribution_ended() -> None:
    cut = said("sure", Say(text="It is 1", nats=0.1, finish_reason="length"))
    result = await SelectSummarizer().fold(state_of(query()), (cut,), Sampling(), lambda _: None)
    assert result.record.finish_reason == "length"
    result = await SelectSummarizer().fold(state_of(query()), (UNSURE, cut), Sampling(), lambda _: None)
    assert (result.record.finish_reason, result.summary) == ("stop", UNSURE.text)  # a cut reply is never the surest


async def test_the_surest_contribution_is_chosen_by_anchored_scores() -> None:
    anchors = {reply.agent: 5.0 * (reply.agent == UNSURE.agent) for reply in REPLIES}

    def choose(replies: Sequence[AgentReply]) -> Selection | None:
        return select_contribution(replies, anchors)

    result = await SelectSummarizer().fold(state_of(query()), REPLIES, Sampling(), lambda _: None, choose)
    assert result.summary == UNSURE.text
    agents = FakeAgents({"summarizer": Fail()})
    config = SummarizerConfig(mode="llm", llm="tiny", profile="Merges.")
    result = await LlmSummarizer(agents, config).fold(state_of(query()), REPLIES, Sampling(), lambda _: None, choose)
    assert result.summary == UNSURE.text


async def test_the_summarizer_is_asked_with_the_contributions_of_the_step() -> None:
    failed = AgentReply(agent="lost", status="failed", error="gone")
    result, _, agents = await fold(Say(text="CONTINUE\nnew", tokens=7, prompt_tokens=30), (*REPLIES, failed))
    (call,) = agents.calls
    assert (call.call_id, call.sampling) == ("t1/1/summarizer", Sampling(max_tokens=70))
    content = call.messages[-1].content
    assert "Work so far, step 1:\nold" in content
    assert "Contribution of unsure:\nIt is 18.\n\nContribution of sure:\nIt is 19." in content
    assert "Contribution of lost" not in content
    record = result.record
    assert (result.summary, record.mode, record.verdict, record.error) == ("new", "llm", "continue", None)
    assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (30, 7)
    assert record.latency_ms > 0
    assert result.selection is None  # no contribution was chosen: the summarizer wrote its own


STREAMS = [
    (("FINAL\n", "It ", "is 19."), ["It ", "is 19."]),
    (("FI", "NAL", "\n", "\n", " It", " is"), [" It", " is"]),
    (("FINAL\n \n", "  \n", " ", "  x\n", "  y\n"), ["   x\n", "  y\n"]),
    (("\n FINAL \nIt",), ["It"]),
    (("FINAL\nFINAL\n19",), ["FINAL\n19"]),
    (("CONTINUE\n", "It ", "is"), []),
    (("FINAL: it ", "is\nFINAL\n", "19"), []),
    (("FINAL",), []),
    (("FINAL\n \n",), []),
]


@pytest.mark.parametrize(("pieces", "streamed"), STREAMS, ids=[repr("|".join(pieces)) for pieces, _ in STREAMS])
async def test_only_text_after_a_final_line_is_streamed(pieces: tuple[str, ...], streamed: list[str]) -> None:
    text = "".join(pieces)
    result, seen, _ = await fold(Say(text=text, pieces=pieces))
    assert seen == streamed
    if streamed:
        assert (result.record.verdict, result.summary) == ("final", "".join(streamed))


class Thin(FakeAgents):
    """Agents behind `withhold`."""

    def __init__(self, fates: Mapping[str, Fate]) -> None:
        super().__init__(fates)
        self.crossed: list[TextDelta | AgentReply] = []
        """What came through."""

    async def stream(self, call: AgentCall) -> AsyncIterator[TextDelta | AgentReply]:
        async for item in withhold(super().stream(call)):
            self.crossed.append(item)
            yield item


@pytest.mark.parametrize(("pieces", "streamed"), STREAMS, ids=[repr("|".join(pieces)) for pieces, _ in STREAMS])
async def test_a_stream_that_was_thinned_out_where_it_runs_reads_the_same(pieces: tuple[str, ...], streamed: list[str]) -> None:
    fate = Say(text="".join(pieces), pieces=pieces)
    agents = Thin({"summarizer": fate})
    whole, _, _ = await fold(fate)
    seen: list[TextDelta] = []
    summarizer = LlmSummarizer(agents, SummarizerConfig(mode="llm", llm="tiny", profile="Merges."))
    thin = await summarizer.fold(state_of(query(), steps=(EARLIER,)), REPLIES, Sampling(), seen.append)
    assert "".join(piece.text for piece in seen) == "".join(streamed)
    assert (thin.summary, thin.record.verdict) == (whole.summary, whole.record.verdict)
    if whole.record.verdict != "final":
        assert [type(item) for item in agents.crossed] == [AgentReply]


@pytest.mark.parametrize("text", ["FINAL", "CONTINUE", ""])
async def test_a_verdict_without_a_summary_takes_the_chosen_contribution(text: str) -> None:
    result, streamed, _ = await fold(Say(text=text))
    assert (result.summary, streamed, result.record.error) == ("It is 19.", [], None)


LOSSES = [
    (Lose(error="node lost", pieces=("FIN",)), "node lost"),
    (Lose(error="node lost", pieces=("CONTINUE\n", "half")), "node lost"),
    (Refuse(), "agent 'summarizer': its queue is full"),
    (Fail(error="out of memory"), "out of memory"),
]


@pytest.mark.parametrize(("fate", "error"), LOSSES, ids=[type(fate).__name__ for fate, _ in LOSSES])
async def test_a_summarizer_that_is_lost_before_its_final_line_falls_back(fate: Fate, error: str) -> None:
    result, streamed, _ = await fold(fate)
    assert (result.summary, streamed) == ("It is 19.", [])
    assert (result.record.verdict, result.record.error) == ("unparsable", error)


@pytest.mark.parametrize("lost", [Lose, Fail], ids=["place died", "agent failed"])
async def test_what_was_streamed_stands_when_the_rest_is_lost(lost: type[Lose] | type[Fail]) -> None:
    result, streamed, _ = await fold(lost(error="node lost", pieces=("FINAL\nIt ", "is 1")))
    assert streamed == ["It ", "is 1"]
    assert (result.summary, result.record.verdict, result.record.error) == ("It is 1", "final", "node lost")
    assert result.record.finish_reason == "length"


async def test_a_stream_without_a_reply_is_lost() -> None:
    class Silent(FakeAgents):
        async def stream(self, call):  # type: ignore[no-untyped-def]  # as FakeAgents.stream
            yield TextDelta(text="CONT")

    config = SummarizerConfig(mode="llm", llm="tiny")
    result = await LlmSummarizer(Silent({}), config).fold(state_of(query()), REPLIES, Sampling(), lambda _: None)
    assert (result.summary, result.record.error) == ("It is 19.", "the stream ended without a reply")


@pytest.mark.parametrize(
    ("pieces", "summary", "streamed"), [(("CONTINUE\n",), "It is 19.", []), (("FINAL\nIt ", "is"), "It is", ["It ", "is"])]
)
async def test_the_deadline_ends_the_summary(pieces: tuple[str, ...], summary: str, streamed: list[str]) -> None:
    result, seen, agents = await fold(Hang(pieces=pieces), deadline_s=0.1)
    assert (result.summary, seen) == (summary, streamed)
    assert result.record.error == "the deadline passed before the summary"
    assert agents.cancelled == ["summarizer"]
