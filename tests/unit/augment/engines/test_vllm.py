from __future__ import annotations

import asyncio
import importlib.util

import pytest

from tpt_megatron.augment.engines.vllm import VllmEngine
from tpt_megatron.config.augment import Sampling, VllmGenerator
from tpt_megatron.errors import ConfigError, MachineError

installed = importlib.util.find_spec("vllm") is not None


def open_engine(**settings) -> None:
    asyncio.run(VllmEngine(VllmGenerator(kind="vllm", model="nothing-here", **settings)).open())


@pytest.mark.skipif(installed, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named() -> None:
    with pytest.raises(MachineError, match=r"vllm is not installed; .* pip install 'tpt-megatron\[vllm\]'"):
        open_engine()


def test_capacity_is_the_configs_concurrency() -> None:
    assert VllmEngine(VllmGenerator(kind="vllm", model="m", concurrency=7)).capacity == 7


@pytest.mark.skipif(not installed, reason="needs vLLM")
class TestWithVllm:
    def test_sampling_is_the_configs_and_only_final_outputs_come(self) -> None:
        from vllm.sampling_params import RequestOutputKind

        from tpt_megatron.augment.engines.vllm import _sampling_params

        values = _sampling_params(Sampling(temperature=0.3, top_p=0.8, top_k=5, max_tokens=77, extra={"min_p": 0.1}), 2**64 + 3)
        assert (values.temperature, values.top_p, values.top_k, values.max_tokens, values.min_p) == (0.3, 0.8, 5, 77, 0.1)
        assert (values.stop, values.seed, values.skip_special_tokens) == (["</think>"], 3, False)
        assert values.output_kind == RequestOutputKind.FINAL_ONLY

    def test_settings_that_it_does_not_know_are_refused_before_anything_is_loaded(self) -> None:
        with pytest.raises(ConfigError, match="the engine vllm does not know nonsense; known are"):
            open_engine(sampling=Sampling(extra={"nonsense": 1}))
        with pytest.raises(ConfigError, match="vLLM refuses it"):
            open_engine(sampling=Sampling(extra={"min_p": 7}))
        with pytest.raises(ConfigError, match=r"engine_args\.model: give the model as generator\.model"):
            open_engine(engine_args={"model": "m"})
        with pytest.raises(ConfigError, match="vLLM refuses them"):
            open_engine(engine_args={"nonsense": 1})
