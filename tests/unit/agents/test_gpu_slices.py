"""Who takes which GPU where all engines of a pool run beside one process. No GPU here: names and positions alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmoa.config import Config
from dmoa.engine_options import TransformersOptions
from dmoa.engines.gpus import GpuSlice, local_gpus, pool_gpus, share_gpus, visible_gpus
from dmoa.engines.transformers import load as loading
from dmoa.errors import ConfigError


def llm(gpus: float, engine: str = "vllm", **options: Any) -> dict[str, Any]:
    model = "scripted:m" if engine == "scripted" else "hub:org/model@abc"
    return {"model": model, "engine": engine, "gpus": gpus, "engine_kwargs": options}


def pool(summarizer: str | None = None, **llms: dict[str, Any]) -> Config:
    """One agent on every LLM but the summarizer's."""
    agents = [{"name": f"on-{name}", "llm": name, "profile": "Works."} for name in llms if name != summarizer]
    tree: dict[str, Any] = {"name": "p", "llms": llms, "agents": agents}
    return Config.model_validate(tree | ({"summarizer": {"mode": "llm", "llm": summarizer}} if summarizer else {}))


@pytest.mark.parametrize(
    ("wanted", "shares"),
    [
        ({}, {}),
        ({"a": 0, "b": 1}, {"b": (0,)}),
        ({"a": 2, "b": 1, "c": 4}, {"a": (0, 1), "b": (2,), "c": (3, 4, 5, 6)}),
        ({"a": 0.5, "b": 2, "c": 0.5}, {"a": (2,), "b": (0, 1), "c": (2,)}),
        ({"a": 0.6, "b": 0.6, "c": 0.4}, {"a": (0,), "b": (1,), "c": (0,)}),
        ({f"n{i}": 0.1 for i in range(11)}, {f"n{i}": (i // 10,) for i in range(11)}),
        ({"a": 1.5, "b": 0.5}, {"a": (0, 1), "b": (2,)}),
    ],
)
def test_shares(wanted: dict[str, float], shares: dict[str, tuple[int, ...]]) -> None:
    assert share_gpus(wanted) == shares
    assert list(share_gpus(wanted)) == list(shares)


@pytest.mark.parametrize(
    ("llms", "gpus"),
    [
        ({"a": llm(0)}, 0),
        ({"a": llm(1), "b": llm(2, tensor_parallel_size=2)}, 3),
        ({"a": llm(0.25, "transformers"), "b": llm(0.5, "transformers")}, 0.75),
        ({"a": llm(1), "b": llm(0.5, "transformers")}, 2),  # Ray takes no 1.5
        ({"a": llm(0.6, "transformers"), "b": llm(0.6, "transformers")}, 2),
        ({"a": llm(1, "scripted")}, 1),
    ],
)
def test_gpus_of_a_worker_are_what_ray_takes(llms: dict[str, Any], gpus: float) -> None:
    assert pool_gpus(pool(**llms)) == gpus


def test_the_summarizers_engine_counts() -> None:
    config = pool("writer", solver=llm(1), writer=llm(1))
    assert pool_gpus(config) == 2
    assert local_gpus(config, ["0", "1"])["writer"] == GpuSlice((1,), ("1",))


def test_gpus_keep_the_names_that_the_process_knows_them_by() -> None:
    config = pool(a=llm(2, tensor_parallel_size=2), b=llm(1), c=llm(0.5, "transformers"), d=llm(1, "scripted"))
    assert local_gpus(config, ["6", "GPU-1a", "3", "2"]) == {
        "a": GpuSlice((0, 1), ("6", "GPU-1a")),
        "b": GpuSlice((2,), ("3",)),
        "c": GpuSlice((3,), ("2",)),
    }


def test_too_few_visible_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError) as refused:
        local_gpus(pool(a=llm(2, tensor_parallel_size=2), b=llm(1)), ["3"])
    assert str(refused.value) == (
        "llms.a.gpus and of b: the pool needs 3 GPU(s) in all (a 2, b 1), and this process sees 1 "
        "(CUDA_VISIBLE_DEVICES: 3); lower gpus (0 for the CPU), let the process see more, or serve the pool and name the server "
        "by --url"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match=r"^llms\.a\.gpus: the pool needs 1 GPU\(s\) .* this process sees 0 .*: not set\)"):
        local_gpus(pool(a=llm(1)), [])


def test_without_a_gpu_transformers_takes_the_cpu() -> None:
    config = pool(a=llm(1, "transformers"), b=llm(0.5, "transformers"))
    assert local_gpus(config, []) == {}
    with pytest.raises(ConfigError, match=r"^llms\.a\.gpus and of b: the pool needs 2 "):
        local_gpus(config, ["0"])


@pytest.mark.parametrize(
    ("variable", "count", "names"),
    [(None, 2, ("0", "1")), ("2, 5", 2, ("2", "5")), ("", 0, ()), ("-1", 0, ()), ("0,1", 1, ("0",)), ("MIG-x", 1, ("MIG-x",))],
)
def test_visible_gpus(variable: str | None, count: int, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names


def test_transformers_takes_the_gpu_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.device_of(TransformersOptions(), 2) == torch.device("cuda:2")
    assert loading.device_of(TransformersOptions(device="cuda"), 1) == torch.device("cuda:1")
    assert loading.device_of(TransformersOptions()) == torch.device("cuda")
    assert loading.device_of(TransformersOptions(device="cpu"), 1) == torch.device("cpu")
    assert loading.device_of(TransformersOptions(dtype="int8"), 1) == torch.device("cpu")
