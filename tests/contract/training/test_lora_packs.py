"""Packs: rows in one sequence get the logits that they would have alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmoa.errors import ConfigError
from dmoa.training.lora import (
    Encoded,
    LoraModel,
    LoraSettings,
    encode,
    pack_training_rows,
    read_training_rows,
    write_training_rows,
)
from tests.unit.training.lora_fixtures import make_rows, save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_packed_row_is_judged_as_it_would_be_alone(model: str) -> None:
    ours = LoraModel(model, LoraSettings(rank=2, alpha=4), seed=1)
    for weight in ours.weights.values():  # a fresh adapter does nothing: B is 0
        torch.nn.init.normal_(weight, std=0.3)
    rows = encode(ours.tokenizer, make_rows(7))
    alone = [ours.judge([row], 1)[0] for row in rows]
    together = ours.judge(rows, 3)
    for one, other in zip(alone, together, strict=True):
        assert other.loss_nats == pytest.approx(one.loss_nats, abs=1e-4)
        assert other.entropy_nats == pytest.approx(one.entropy_nats, abs=1e-5)
    assert ours.loss(rows, 3).item() == pytest.approx(sum(one.loss_nats for one in alone), abs=1e-3)


def test_a_row_alone_is_what_transformers_computes(model: str) -> None:
    folder = model.removeprefix("path:")
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    row = encode(tokenizer, make_rows(3))[2]
    tokens = torch.tensor([[*row.prompt, *row.target]])
    with torch.no_grad():
        logits_TV = reference(tokens).logits[0, len(row.prompt) - 1 : -1].double()
    log_p = logits_TV.log_softmax(dim=1)
    expected_loss = -float(log_p[torch.arange(len(row.target)), torch.tensor(row.target)].sum())
    expected_entropy = float(-(log_p.exp() * log_p).sum(dim=1).mean())
    judged = LoraModel(model, LoraSettings(rank=2), seed=1).judge([row], 1)[0]
    assert judged.loss_nats == pytest.approx(expected_loss, abs=1e-4)
    assert judged.entropy_nats == pytest.approx(expected_entropy, abs=1e-5)


def test_layout_by_hand() -> None:
    packs = pack_training_rows([Encoded((1, 2, 3), (7, 9), "a"), Encoded((1, 2, 4, 5), (8,), "b")], rows_per_pack=2)
    # Shared: 1 2. Then row 0's own 3 7 and row 1's own 4 5; the last target token is never put in.
    assert packs.tokens_NT.tolist() == [[1, 2, 3, 7, 4, 5]]
    assert packs.positions_NT.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert packs.asked_M.tolist() == [2, 3, 5]
    assert packs.target_M.tolist() == [7, 9, 8]
    assert packs.row_M.tolist() == [0, 0, 1]
    assert packs.mask_N1TT[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_equal_prompts_keep_a_token_each_to_predict_from() -> None:
    packs = pack_training_rows([Encoded((1, 2), (5,), ""), Encoded((1, 2), (6,), "")], rows_per_pack=2)
    assert packs.tokens_NT.tolist() == [[1, 2, 2]]
    assert packs.asked_M.tolist() == [1, 2]


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = make_rows(3)
    write_training_rows(tmp_path / "rows.jsonl", rows)
    assert read_training_rows(tmp_path / "rows.jsonl") == rows


def test_texts_of_rows_may_hold_any_line_separator(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"target": "a\u2028b\u2029c\u0085d\x0be\x1cf\r\n"}) for row in make_rows(2)]
    write_training_rows(tmp_path / "rows.jsonl", rows)
    assert read_training_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": []}', "line 2: target: missing"),
        ("{", "line 2: not valid JSON"),
        ('{"target": 3, "messages": []}', "target"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(make_rows(1)[0].model_dump_json() + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_training_rows(file)
