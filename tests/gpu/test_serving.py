"""An export on a device answers as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ul2r.inference import LanguageModel, complete, infill
from ul2r.inference.generation import IncrementalDecoder
from ul2r.testing.gpu import get_device, is_rehearsal
from ul2r.testing.models import write_tiny_export

pytestmark = pytest.mark.gpu

PROMPT = "The sea was calm, and so was"
PARTS = ["def area(", ", height):\n    return ", " * height\n"]


@pytest.fixture(scope="module", params=["prefix", "causal"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LanguageModel, LanguageModel]:
    """Load an export on the CPU and on the device; exports of tests are in fp32, which a device keeps."""
    folder = write_tiny_export(tmp_path_factory.mktemp("export"), attention=request.param)
    on_cpu, on_device = (
        LanguageModel.load(folder, device) for device in ("cpu", str(get_device()))
    )
    assert on_device.device == get_device()
    assert on_device.network.dtype == on_cpu.network.dtype == torch.float32
    return on_cpu, on_device


def test_logits_equal_those_of_the_cpu(models: tuple[LanguageModel, LanguageModel]) -> None:
    """Of a prompt in one pass, and of each token after it through the cache."""
    on_cpu, _ = models
    prompt = on_cpu.encode(PROMPT)
    decoders = [
        IncrementalDecoder(model, prompt, bidirectional=model.attention == "prefix")
        for model in models
    ]
    for token in on_cpu.encode(" he. Two more"):
        expected, found = (decoder.logits for decoder in decoders)
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for decoder in decoders:
            decoder.feed(token)

    tokens = torch.tensor([prompt, prompt[::-1]])
    start = torch.zeros(tokens.shape, dtype=torch.int32)
    end = torch.clamp(torch.arange(len(prompt)).expand(2, -1) + 1, min=5).int()
    expected, found = (model.logits(tokens, start, end).cpu() for model in models)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_and_fills_equal_those_of_the_cpu(
    models: tuple[LanguageModel, LanguageModel], temperature: float
) -> None:
    """Token by token, greedy and sampled: a seed gives the same sample whatever the device."""
    completions = [
        complete(model, PROMPT, max_tokens=24, temperature=temperature, seed=3) for model in models
    ]
    assert completions[1] == completions[0]
    assert completions[0].completion_tokens > 4
    if models[0].attention == "prefix":
        fills = [
            infill(model, PARTS, max_tokens=12, temperature=temperature, seed=3) for model in models
        ]
        assert fills[1] == fills[0]
        assert len(fills[0].fills) == 2


def test_deployment_on_a_device_answers_as_the_model_on_the_cpu(tmp_path: Path) -> None:
    """Over HTTP, by Ray Serve, which gives the replica its device."""
    pytest.importorskip("ray", reason="Ray is not installed: no deployment")
    import httpx

    from serving.app import ServingConfig
    from serving.server import serve_model
    from ul2r.launch.ray_train.cluster import connect_ray
    from ul2r.tracking.server import find_free_port

    folder = write_tiny_export(tmp_path / "export")
    config = ServingConfig(model=str(folder), gpus=0 if is_rehearsal() else 1)
    with (
        connect_ray(config.cpus, config.gpus),
        serve_model(config, find_free_port()) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        completed = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 24}).json()
        filled = client.post(
            "/v1/infill", json={"prompt": "<slot>".join(PARTS), "max_tokens": 12}
        ).json()

    model = LanguageModel.load(folder)
    assert completed["choices"][0]["text"] == complete(model, PROMPT, max_tokens=24).text
    assert filled["fills"] == list(infill(model, PARTS, max_tokens=12).fills)
