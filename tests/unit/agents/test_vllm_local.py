"""In which environment each vLLM beside one process starts. A recorder stands in for vLLM, which need not be installed."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dmoa.agents import pool
from dmoa.config import AgentConfig, Config
from dmoa.engines.gpus import GpuSlice
from dmoa.engines.vllm.start import connect, engine_args, vllm_options
from dmoa.errors import ConfigError, EngineError

GPUS = ("4", "5", "7", "GPU-8a")
GPU_NAMES = ("CUDA_VISIBLE_DEVICES", "VLLM_WORKER_MULTIPROC_METHOD")
CPU_NAMES = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")


class Recorder:
    """Stands in for vLLM and for transformers' engine; keeps what each was started with."""

    def __init__(self) -> None:
        self.args: list[dict[str, Any]] = []
        self.environments: list[dict[str, str]] = []
        self.gpus: list[int] = []
        self.fails = False

    def build_local(self, config: Config) -> None:
        pool.build_local(config, visible=GPUS, build=self._build)

    def _build(self, config: Config, llm: str, agents: list[AgentConfig], gpus: GpuSlice | None) -> Any:
        part = config.llms[llm]
        if part.engine == "vllm":
            given = vllm_options(part, llm)
            return connect(part, given, engine_args(part, given, ()), gpus, self._start)
        assert gpus is not None
        self.gpus.append(gpus.positions[0])
        return "engine"

    def _start(self, args: dict[str, Any]) -> str:
        self.args.append(dict(args))
        self.environments.append(dict(os.environ))
        if self.fails:
            raise RuntimeError("no memory")
        return "client"

    def seen(self, *names: str) -> list[tuple[str | None, ...]]:
        return [tuple(found.get(name) for name in names) for found in self.environments]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    for name in (*GPU_NAMES, *CPU_NAMES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    return Recorder()


def of(**llms: dict[str, Any]) -> Config:
    parts = {name: {"model": "hub:org/model@abc", "engine": "vllm"} | part for name, part in llms.items()}
    agents = [{"name": f"on-{name}", "llm": name, "profile": "Works."} for name in llms]
    return Config.model_validate({"name": "p", "llms": parts, "agents": agents})


def test_every_engine_sees_its_own_gpus_alone(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7,GPU-8a")
    wide = {"gpus": 2, "engine_kwargs": {"tensor_parallel_size": 2}}
    share = {"engine": "transformers", "gpus": 0.5}
    recorder.build_local(of(one={"gpus": 1}, wide=wide, small=share, other=share))
    assert recorder.seen(*GPU_NAMES) == [("4", "spawn"), ("5,7", "spawn")]
    assert recorder.gpus == [3, 3]
    assert [args.get("distributed_executor_backend") for args in recorder.args] == [None, "mp"]
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")) == ("4,5,7,GPU-8a", None)


def test_no_engine_tells_its_makers_of_its_use_unless_it_is_to(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "")  # so that it is put back
    monkeypatch.delenv("VLLM_NO_USAGE_STATS")
    recorder.build_local(of(one={}))
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    recorder.build_local(of(one={}))
    assert recorder.seen("VLLM_NO_USAGE_STATS") == [("1",), ("0",)]


def test_more_gpus_than_visible_are_refused_before_any_engine_starts(recorder: Recorder) -> None:
    with pytest.raises(ConfigError, match=r"^llms\.a\.gpus and of b: the pool needs 5 .* \(a 1, b 4\), and this process sees 4 "):
        recorder.build_local(of(a={"gpus": 1}, b={"gpus": 4, "engine_kwargs": {"tensor_parallel_size": 4}}))
    assert recorder.args == []


def test_every_engine_on_the_cpu_has_its_own_threads_and_room(recorder: Recorder) -> None:
    first, second = ({"engine_kwargs": {"threads": n, "cpu_kv_cache_gib": 2 * n}} for n in (1, 3))
    recorder.build_local(of(first=first, second=second))
    assert recorder.seen(*CPU_NAMES) == [("1", "2"), ("3", "6")]
    assert [name for name in CPU_NAMES if name in os.environ] == []


def test_the_environment_is_as_before_also_after_a_start_that_failed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    recorder.fails = True
    with pytest.raises(EngineError, match=r"model 'hub:org/model@abc': vLLM did not start: RuntimeError: no memory; what it"):
        recorder.build_local(of(only={"engine_kwargs": {"threads": 2}}))
    assert recorder.seen("OMP_NUM_THREADS") == [("2",)]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
