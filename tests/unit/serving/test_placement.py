"""`dmoa serve --dry-run` without its screen: plans, supplies, memory and faults, on nodes given as plain records."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmoa.agents.pool import load_pool, packaged_pools
from dmoa.config import Config
from dmoa.engines.size import ModelSize
from dmoa.errors import ConfigError
from dmoa.serving.capacity import DryRun, GpuNode, Supply, assemble, kind_of_device, local_supply, nodes_of_ray, published_bytes
from dmoa.serving.failures import explain
from dmoa.serving.placement import deployment_names, plan_of
from dmoa.serving.router.replica_health import presence

GIB = 2**30
# 10 B parameters; 40 layers, 8 key-value heads of 128: in bfloat16 160 KiB a token.
TEN = ModelSize(
    num_parameters=10 * 2**30, dtype="bfloat16", lora_width=2**20, num_layers=40, num_heads=8, head_size=128, max_model_len=32768
)
MODEL = "hub:me/ten"


PARTS = ("ingress", "encoder", "router", "traces", "feedback")


def pool(agents: int = 1, *, llm: dict[str, Any] | None = None, agent: dict[str, Any] | None = None, **kwargs: Any) -> Config:
    """A pool of agents with one GPU each on vLLM; `kwargs` are engine options."""
    part = {"model": MODEL, "engine": "vllm", "placement": "dedicated", "gpus": 1, "engine_kwargs": kwargs}
    return Config.model_validate(
        {
            "name": "p",
            "llms": {"big": part | (llm or {})},
            "agents": [{"name": f"a{i}", "llm": "big", "profile": "Works."} | (agent or {}) for i in range(agents)],
        }
    )


def supply(*nodes: GpuNode) -> Supply:
    return Supply(source="the test", nodes=nodes)


def node(name: str, gpus: float, kind: str = "H100", **more: Any) -> GpuNode:
    return GpuNode(name=name, gpus=gpus, kinds=(kind,), **more)


def judged(config: Config, *nodes: GpuNode, size: ModelSize | str = TEN) -> DryRun:
    return assemble(config, supply(*nodes), {MODEL: size})


def test_dedicated_agents_are_deployments_of_their_own() -> None:
    plan = plan_of(pool(3, agent={"autoscaling": {"min_replicas": 1, "max_replicas": 2}}))
    assert [item.name for item in plan.deployments] == ["agent-a0", "agent-a1", "agent-a2"]
    assert [item.agents for item in plan.deployments] == [("a0",), ("a1",), ("a2",)]
    assert (plan.min_gpus, plan.max_gpus) == (3, 6)
    assert {part.name: part.replicas for part in plan.parts} == dict.fromkeys(PARTS, 1)


@pytest.mark.parametrize(("feedback", "parts"), [("on", "256 MB at most"), ("off", None)])
def test_what_is_kept_of_queries_takes_a_place_unless_nothing_is(feedback: str, parts: str | None) -> None:
    config = pool(1)
    router = config.router.model_copy(update={"feedback": feedback, "feedback_mb": 256})
    found = {part.name: part.purpose for part in plan_of(config.model_copy(update={"router": router})).parts}
    assert ("feedback" in found) == (parts is not None)
    assert parts is None or parts in found["feedback"]


def test_shared_agents_and_the_summarizer_are_one_deployment() -> None:
    config = pool(2, llm={"placement": "shared", "autoscaling": {"min_replicas": 2, "max_replicas": 4}})
    config = Config.model_validate(config.model_dump() | {"summarizer": {"mode": "llm", "llm": "big"}})
    (item,) = plan_of(config).deployments
    assert (item.name, item.agents) == ("llm-big", ("a0", "a1", "summarizer"))
    assert (item.min_gpus, item.max_gpus) == (2, 4)


def test_agents_in_the_ingress_have_no_deployment_and_are_never_gone() -> None:
    far = {"model": "openai:x", "engine": "openai", "engine_kwargs": {"base_url": "https://api.example.com/v1"}}
    tree = pool(2).model_dump(mode="json")
    tree["llms"] |= {"far": far, "further": far}
    tree["agents"] += [{"name": f"b{i}", "llm": llm, "profile": "Works."} for i, llm in enumerate(("far", "far", "further"))]
    config = Config.model_validate(tree | {"server": {"ingress_replicas": 2}})
    assert deployment_names(config) == {"a0": "agent-a0", "a1": "agent-a1"}
    rows = [(item.name, item.llm, item.agents, item.min_replicas) for item in plan_of(config).deployments[2:]]
    assert rows == [("ingress", "far", ("b0", "b1"), 2), ("ingress", "further", ("b2",), 2)]
    down = SimpleNamespace(replica_states={}, status="UPDATING")
    assert presence(config, {"ingress": down, "agent-a0": down}).gone == {"a0"}
    assert (
        explain(config, "ingress", "llms.far.engine_kwargs: no key")
        == "ingress: it did not start: llms.far.engine_kwargs: no key"
    )


def test_a_replica_over_several_gpus() -> None:
    (item,) = plan_of(pool(llm={"gpus": 8}, tensor_parallel_size=4, pipeline_parallel_size=2)).deployments
    assert (item.gpus, item.gpus_together, item.pipeline_parallel) == (8, 4, 2)


@pytest.mark.parametrize("name", packaged_pools())
def test_packaged_pools_need_no_gpu_and_pass_anywhere(name: str) -> None:
    found = assemble(load_pool(name), supply(), {})
    assert (found.faults, found.plan.max_gpus) == ((), 0)


def test_memory_of_a_gpu_by_hand() -> None:
    memory = judged(pool(max_model_len=16384), node("n", 1, asked_bytes=40 * GIB)).memories["agent-a0"]
    assert memory.weights_bytes == 20 * GIB
    assert memory.budget_bytes == 36 * GIB
    assert memory.room_bytes == 16 * GIB
    assert memory.token_bytes == 40 * 2 * 8 * 128 * 2 == 160 * 1024
    assert memory.room_tokens == 16 * GIB // (160 * 1024) == 104857
    assert memory.num_sequences == pytest.approx(6.4, abs=1e-3)


def test_parallel_gpus_share_weights_keys_and_values() -> None:
    config = pool(llm={"gpus": 4}, tensor_parallel_size=2, pipeline_parallel_size=2)
    memory = judged(config, node("n", 4, asked_bytes=40 * GIB)).memories["agent-a0"]
    assert memory.weights_bytes == 5 * GIB
    assert memory.token_bytes == 20 * 2 * 4 * 128 * 2


def test_adapters_take_room_for_the_largest_rank() -> None:
    config = pool(2, llm={"placement": "shared"}, max_lora_rank=32)
    tree = config.model_dump()
    tree["agents"][0]["adapter"], tree["agents"][1]["adapter"] = "path:/none/a", "path:/none/b"
    found = judged(Config.model_validate(tree), node("n", 1, asked_bytes=40 * GIB))
    assert found.memories["llm-big"].adapters_bytes == 2 * 32 * 2**20 * 2
    assert found.memories["llm-big"].room_bytes == 16 * GIB - 128 * 2**20
    assert [fault for fault in found.faults if "agents.a0.adapter" in fault]


def test_float32_models_run_in_half_of_it_under_auto() -> None:
    single = ModelSize(
        num_parameters=2**30, dtype="float32", lora_width=1, num_layers=1, num_heads=1, head_size=1, max_model_len=64
    )
    assert judged(pool(), node("n", 1), size=single).memories["agent-a0"].weights_bytes == 2 * GIB
    assert judged(pool(dtype="float32"), node("n", 1), size=single).memories["agent-a0"].weights_bytes == 4 * GIB


def test_a_pool_that_fits_has_no_fault() -> None:
    found = judged(pool(8), node("a", 4), node("b", 4))
    assert (found.faults, found.notes) == ((), ())
    assert found.to_json()["ok"] is True
    assert found.to_json()["gpus"] | {"nodes": 0} == {
        "source": "the test",
        "available": 8,
        "needed_min": 8,
        "needed_max": 8,
        "nodes": 0,
    }


def test_too_few_gpus() -> None:
    (fault,) = judged(pool(8), node("a", 4), node("b", 2)).faults
    assert fault.startswith("llms.big.gpus: 8 in all at min_replicas (agent-a0 1 x 1, ")
    assert "there are 6 on the test (a 4, b 2)" in fault


def test_growth_beyond_the_cluster_is_a_note() -> None:
    found = judged(pool(2, agent={"autoscaling": {"min_replicas": 1, "max_replicas": 3}}), node("a", 4))
    assert found.faults == ()
    assert "asks for 6 GPUs, the test has 4" in found.notes[0]


def test_a_replica_wider_than_any_node() -> None:
    (fault,) = judged(pool(llm={"gpus": 4}, tensor_parallel_size=4), node("a", 2), node("b", 2)).faults
    assert fault.startswith("llms.big.engine_kwargs.tensor_parallel_size: a replica's 4 GPUs")
    assert "has 2" in fault


def test_stages_of_a_pipeline_may_be_on_several_nodes() -> None:
    config = pool(llm={"gpus": 4}, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert judged(config, node("a", 2), node("b", 2)).faults == ()


def test_gpus_in_pieces_that_are_too_small() -> None:
    config = pool(3, llm={"gpus": 2}, tensor_parallel_size=2)
    found = judged(config, node("a", 3), node("b", 3))
    (fault,) = found.faults
    assert fault.startswith("llms.big.gpus: 3 replicas at min_replicas have 2 GPUs or more, each on one node, and")
    assert "the test has room for 2 (a 3, b 3); lower min_replicas" in fault
    assert found.notes == ()
    assert judged(config, node("a", 3), node("b", 4)).faults == ()


def test_parts_of_a_gpu_are_of_one_gpu() -> None:
    part = {"engine": "transformers", "gpus": 0.6, "engine_kwargs": {"dtype": "bfloat16"}}
    (fault,) = judged(pool(3, llm=part), node("a", 2)).faults  # 1.8 of 2, and only one of 0.6 a GPU
    assert fault == (
        "llms.big.gpus: 3 times 0.6 of one GPU are asked for at min_replicas, and the test has room for 2 (a 2); lower "
        "min_replicas or gpus, or add a GPU"
    )
    assert judged(pool(3, llm=part), node("a", 1), node("b", 2)).faults == ()
    assert judged(pool(6, llm=part | {"gpus": 1 / 3}), node("a", 2)).faults == ()
    assert judged(pool(4, llm=part | {"gpus": 0.4}), node("a", 2)).faults == ()
    (fault,) = judged(pool(5, llm=part | {"gpus": 0.4}), node("a", 2)).faults
    assert fault.startswith("llms.big.gpus: 5 times 0.4 of one GPU are asked for at min_replicas, and the test has room for 4")


def test_gpus_of_a_kind_in_pieces_that_are_too_small() -> None:
    config = pool(llm={"gpus": 4}, tensor_parallel_size=4, accelerator_type="H100")
    assert judged(config, node("a", 4), node("b", 8, "L4")).faults == ()
    two = pool(2, llm={"gpus": 2}, tensor_parallel_size=2, accelerator_type="H100")
    (fault,) = judged(two, node("a", 3), node("b", 1), node("c", 8, "L4")).faults
    assert "the test has room for 1 of kind H100 (a 3, b 1);" in fault


def test_stages_in_pieces_that_are_too_small_are_a_note() -> None:
    config = pool(llm={"gpus": 6}, tensor_parallel_size=2, pipeline_parallel_size=3)
    found = judged(config, node("a", 3), node("b", 3))
    assert found.faults == ()
    assert "3 times 2 GPUs on one node are wanted, the test has room for 2" in found.notes[0]
    assert "Ray would spread a stage of a pipeline over nodes" in found.notes[0]


def test_a_tensor_parallel_replica_is_on_one_node_and_a_pipeline_need_not_be() -> None:
    changes = [{"gpus": 2}, {"gpus": 4}]
    options = [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
    plans = [plan_of(pool(llm=llm, **kwargs)) for llm, kwargs in zip(changes, options, strict=True)]
    assert [plan.deployments[0].is_on_one_node for plan in plans] == [True, False]


def test_weights_that_do_not_fit() -> None:
    (fault,) = judged(pool(gpu_memory_utilization=0.8), node("n", 1, "L4")).faults
    assert fault.startswith("llms.big.model: 'hub:me/ten' has 20.0 GiB of weights on each of 1 GPU(s), more than")
    assert "18.0 GiB (0.8 of 22.5 GiB of L4 on n); raise tensor_parallel_size and gpus" in fault


def test_room_for_less_than_one_sequence() -> None:
    found = judged(pool(max_model_len=16384), node("n", 1, asked_bytes=24 * GIB))
    room = int(24 * GIB * 0.9) - 20 * GIB
    tokens = room // (160 * 1024)
    (fault,) = found.faults
    assert fault.startswith(f"llms.big.engine_kwargs.max_model_len: 16384 tokens do not fit, at most {tokens} do: 20.0 GiB of")
    assert judged(pool(max_model_len=tokens), node("n", 1, asked_bytes=24 * GIB)).faults == ()
    assert judged(pool(max_model_len=tokens + 1), node("n", 1, asked_bytes=24 * GIB)).faults != ()


def test_layers_with_a_window_do_not_make_a_sequence_too_long() -> None:
    windows = dataclasses.replace(TEN, num_window_layers=30)
    room = int(24 * GIB * 0.9) - 20 * GIB
    most = room // (40 * 1024)  # a quarter of the layers needs a quarter of the bytes
    config = pool(max_model_len=most)
    found = judged(config, node("n", 1, asked_bytes=24 * GIB), size=windows)
    assert found.faults == ()
    assert "fits only because some layers look back over a window" in found.notes[0]
    assert found.memories["agent-a0"].num_sequences == pytest.approx(0.25, abs=1e-3)
    (fault,) = judged(pool(max_model_len=most + 1), node("n", 1, asked_bytes=24 * GIB), size=windows).faults
    assert f"at most {most} do: " in fault
    assert "40960 bytes a token in the layers without a window" in fault


def test_a_kind_that_no_node_has() -> None:
    (fault,) = judged(pool(accelerator_type="H200"), node("n", 8)).faults
    assert fault.startswith("llms.big.engine_kwargs.accelerator_type is 'H200'; no node of the test has it; it has H100")


def test_too_few_of_a_kind() -> None:
    (fault,) = judged(pool(3, accelerator_type="H100"), node("a", 2), node("b", 6, "L40S")).faults
    assert "3 in all at min_replicas" in fault
    assert "there are 2 H100 on the test (a 2)" in fault


def test_all_faults_are_told_at_once() -> None:
    config = pool(2, llm={"gpus": 4}, tensor_parallel_size=4, gpu_memory_utilization=0.1)
    faults = judged(config, node("a", 2, asked_bytes=40 * GIB)).faults
    assert [fault.split(":")[0].rpartition(".")[2] for fault in faults] == ["gpus", "tensor_parallel_size", "model"]


def test_an_unknown_model_is_counted_only() -> None:
    found = judged(pool(), node("n", 1, "T4"), size="the hub is away")
    assert found.faults == ()
    assert "memory is not checked" in found.notes[0]
    assert "the hub is away" in found.notes[0]


def test_gpus_of_unknown_memory_are_counted_only() -> None:
    found = judged(pool(), GpuNode(name="n", gpus=1))
    assert found.faults == ()
    assert "the GPUs of n are of a kind whose memory is not known here" in found.notes[0]
    assert judged(pool(2), GpuNode(name="n", gpus=1)).faults != ()


def test_mixed_gpus_are_judged_by_the_largest_with_a_note_on_the_others() -> None:
    found = judged(pool(max_model_len=8192), node("a", 1, "L4"), node("b", 1, "H100"))
    assert found.faults == ()
    assert "GPUs of 79.6 GiB take it, those of 22.5 GiB do not: set accelerator_type" in found.notes[0]


def test_a_name_with_two_sizes_counts_as_the_larger_and_says_so() -> None:
    found = judged(pool(), node("n", 1, "A100"))
    assert found.memories["agent-a0"].memory_bytes == 80 * GIB
    assert "A100 comes in several sizes" in found.notes[0]
    exact = judged(pool(), GpuNode(name="n", gpus=1, kinds=("A100", "A100-40G")))
    assert exact.memories["agent-a0"].memory_bytes == 40 * GIB
    assert exact.notes == ()


def test_memory_as_published_where_the_machine_has_no_gpu() -> None:
    found = judged(pool(accelerator_type="L40S", max_model_len=8192))
    assert found.memories["agent-a0"].memory_bytes == published_bytes(("L40S",))
    assert len([fault for fault in found.faults if "L40S" in fault]) == 1


def test_vllm_on_a_cpu_keeps_its_own_room() -> None:
    found = judged(pool(llm={"gpus": 0}, cpu_kv_cache_gib=2, max_model_len=64))
    memory = found.memories["agent-a0"]
    assert (found.faults, memory.device, memory.room_bytes, memory.memory_bytes) == ((), "cpu", 2 * GIB, None)


def test_a_part_of_a_gpu_has_that_part_of_its_memory() -> None:
    config = pool(2, llm={"engine": "transformers", "gpus": 0.5, "engine_kwargs": {"dtype": "bfloat16"}})
    found = judged(config, node("n", 1, asked_bytes=48 * GIB))
    assert (found.faults, found.plan.min_gpus) == ((), 1)
    assert found.memories["agent-a0"].budget_bytes == 24 * GIB


def test_nodes_as_ray_tells_them() -> None:
    records = [
        {
            "NodeID": "0" * 56,
            "Alive": True,
            "NodeManagerHostname": "head",
            "Resources": {"CPU": 8.0, "node:__internal_head__": 1.0},
        },
        {"Alive": True, "NodeManagerHostname": "w1", "Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0, "CPU": 64.0}},
        {"Alive": True, "NodeManagerHostname": "w2", "Resources": {"GPU": 4.0}},
        {"Alive": False, "NodeManagerHostname": "w3", "Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0}},
    ]
    found = nodes_of_ray(records)
    assert found == (GpuNode(name="w1", gpus=8.0, kinds=("H100",)), GpuNode(name="w2", gpus=4.0))
    assert [item.memory_bytes for item in found] == [81559 * 2**20, None]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
    ],
)
def test_devices_are_named_as_ray_names_them(name: str, kind: str) -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    assert kind_of_device(name) == kind == NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)


def test_gpus_of_this_machine_as_torch_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    devices = [("NVIDIA H100 80GB HBM3", 79 * GIB), ("NVIDIA T400", 4 * GIB), ("NVIDIA H100 80GB HBM3", 79 * GIB)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=devices[i][0], total_memory=devices[i][1])
    )
    found = local_supply()
    assert [(item.gpus, item.kinds, item.memory_bytes) for item in found.nodes] == [
        (2, ("H100",), 79 * GIB),
        (1, ("T400",), 4 * GIB),
    ]
    assert found.gpus == 3


def test_gpus_that_the_driver_does_not_let_torch_use_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def silent(_number: int) -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount().\nError 802: system not yet initialized")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", silent)
    with pytest.raises(ConfigError, match=r"8 GPU\(s\) that torch cannot use \(Unexpected .* Error 802.*; mend the driver"):
        local_supply()


def test_the_table_knows_rays_names() -> None:
    from ray.util.accelerators import accelerators

    from dmoa.serving.capacity import PUBLISHED_MIB

    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_")}
    assert set(PUBLISHED_MIB) <= known


def test_a_folder_with_weights_is_named_by_its_path(tmp_path: Path) -> None:
    config = pool(llm={"model": f"path:{tmp_path}"})
    found = assemble(config, supply(node("n", 1)), {f"path:{tmp_path}": TEN})
    assert found.memories["agent-a0"].num_parameters == TEN.num_parameters
