from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_model import tiny_model_folder
from tpt_megatron.augment.engines.base import Reply, RequestFailed
from tpt_megatron.augment.engines.transformers import TransformersEngine
from tpt_megatron.augment.trajectory import read_trajectory
from tpt_megatron.config.augment import Sampling, TransformersGenerator
from tpt_megatron.errors import ConfigError, DataError, MachineError

QUESTION = ({"role": "user", "content": "Photosynthesis turns light into sugar.\n## Thoughts\nSimulate an expert's in-depth thought process about the text."},)
FREE = Sampling(max_tokens=128, stop=())
GREEDY = Sampling(temperature=0, max_tokens=128, stop=())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


def ask(folder: Path, *requests: tuple[Sampling, int], batch_size: int = 8, messages=QUESTION, notes: dict | None = None) -> list[Reply]:
    """Ask everything at once and return the replies in order."""

    async def run() -> list[Reply]:
        engine = TransformersEngine(TransformersGenerator(kind="transformers", model=str(folder), sampling=FREE, batch_size=batch_size))
        await engine.open()
        try:
            return await asyncio.gather(*(engine.complete(messages, sampling, seed) for sampling, seed in requests))
        finally:
            if notes is not None:
                notes.update(engine.notes())
            await engine.close()

    return asyncio.run(run())


def test_a_whole_reply_thinks_answers_and_hides_its_end_token(tiny_model: Path) -> None:
    replies = ask(tiny_model, *((FREE, seed) for seed in range(8)))
    ended = [reply for reply in replies if reply.finish_reason == "stop"]
    assert len(ended) >= 6, "the tiny model should nearly always end its reply"
    for reply in ended:
        assert reply.content is not None and reply.content.startswith("<think>\n") and "</think>\n\n" in reply.content
        assert "<|im_end|>" not in reply.content and "<|endoftext|>" not in reply.content
        assert read_trajectory(reply, "reasoning", ()).closed
        assert reply.stop_reason is None and reply.prompt_tokens > 40 and 10 < reply.generated_tokens < 128
    assert len({reply.content for reply in replies}) > 4, "different seeds give different replies"


def test_the_stop_text_ends_a_reply_and_is_left_out(tiny_model: Path) -> None:
    stopped, whole = ask(tiny_model, (Sampling(temperature=0, max_tokens=128), 0), (GREEDY, 0))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "</think>")
    assert whole.content.startswith(stopped.content + "</think>")
    assert stopped.generated_tokens < whole.generated_tokens


def test_a_stop_text_that_spans_tokens_is_found(tiny_model: Path) -> None:
    (whole,) = ask(tiny_model, (GREEDY, 0))
    word = whole.content[11:24]  # from the middle of a word to the middle of another
    (stopped,) = ask(tiny_model, (Sampling(temperature=0, max_tokens=128, stop=("never", word)), 0))
    assert stopped.stop_reason == word
    assert stopped.content == whole.content[: whole.content.index(word)]


def test_a_cut_reply_says_so(tiny_model: Path) -> None:
    (reply,) = ask(tiny_model, (Sampling(max_tokens=6), 0))
    assert (reply.finish_reason, reply.stop_reason, reply.generated_tokens) == ("length", None, 6)
    assert not read_trajectory(reply, "reasoning", ("</think>",)).closed


def test_a_reply_does_not_depend_on_its_batch(tiny_model: Path) -> None:
    notes: dict = {}
    together = ask(tiny_model, *((FREE, seed) for seed in range(5)), notes=notes)
    assert notes["batches"] == 1, "five requests at once are one batch"
    *alone, again = ask(tiny_model, *((FREE, seed) for seed in (0, 1, 2, 3, 4, 0)), batch_size=1)
    # Rounding may part a row from itself in another batch; most rows it does not reach.
    assert sum(one.content == other.content for one, other in zip(together, alone, strict=True)) >= 4
    assert again == alone[0]


def test_requests_of_other_sampling_are_other_batches(tiny_model: Path) -> None:
    notes: dict = {}
    short, long = ask(tiny_model, (Sampling(max_tokens=3), 0), (Sampling(max_tokens=5), 0), notes=notes)
    assert (short.generated_tokens, long.generated_tokens) == (3, 5)
    assert notes["batches"] == 2


def test_greedy_ignores_the_seed_and_top_k_of_one_is_greedy(tiny_model: Path) -> None:
    one, two = ask(tiny_model, (GREEDY, 1), (GREEDY, 2))
    assert one == two
    (narrow,) = ask(tiny_model, (Sampling(max_tokens=128, stop=(), top_k=1), 3))
    assert narrow.content == one.content


def test_the_folders_own_sampling_defaults_are_not_used(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    defaults = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(defaults | {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_new_tokens": 4}))
    assert ask(folder, (GREEDY, 0))[0].content == ask(tiny_model, (GREEDY, 0))[0].content


def test_a_thought_that_the_template_opens_is_opened_in_the_reply(tiny_model: Path) -> None:
    extra = {"chat_template_kwargs": {"open_thought": True}}
    whole, stopped, cut = ask(
        tiny_model,
        (Sampling(temperature=0, max_tokens=128, stop=(), extra=extra), 0),
        (Sampling(temperature=0, max_tokens=128, extra=extra), 0),
        (Sampling(temperature=0, max_tokens=6, extra=extra), 0),
    )
    thought = read_trajectory(whole, "reasoning", ())
    assert thought.closed and thought.text and "<think>" not in thought.text
    assert read_trajectory(stopped, "reasoning", ("</think>",)) == thought
    unfinished = read_trajectory(cut, "reasoning", ("</think>",))
    assert not unfinished.closed and unfinished.text and thought.text.startswith(unfinished.text)


def test_a_prompt_beyond_the_context_fails_alone(tiny_model: Path) -> None:
    with pytest.raises(RequestFailed, match=r"prompt of \d+ tokens and max_tokens=8190 exceed the model's context of 8192 tokens"):
        ask(tiny_model, (Sampling(max_tokens=8190), 0))


def test_a_template_that_refuses_the_chat_fails_the_request(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestFailed, match="chat template refuses the messages: roles must alternate"):
        ask(folder, (FREE, 0))


def test_closing_ends_a_batch_under_way(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"  # with an end token that the model never writes, 8,000 tokens take 13 s and more
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text("{}")
    configuration = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(configuration | {"eos_token_id": configuration["pad_token_id"]}))

    async def run() -> None:
        engine = TransformersEngine(TransformersGenerator(kind="transformers", model=str(folder), sampling=FREE))
        await engine.open()
        request = asyncio.create_task(engine.complete(QUESTION, Sampling(temperature=0, max_tokens=8000, stop=("never",)), 0))
        async with asyncio.timeout(60):
            while engine.notes()["batches"] == 0:
                await asyncio.sleep(0.01)
        started = time.monotonic()
        await engine.close()
        assert time.monotonic() - started < 6
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(run())


def open_engine(folder: Path, **settings) -> None:
    async def run() -> None:
        engine = TransformersEngine(TransformersGenerator(kind="transformers", model=str(folder), **settings))
        await engine.open()
        await engine.close()

    asyncio.run(run())


def test_settings_that_cannot_be_had_are_refused_at_the_start(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing-here' is not a Hugging Face model folder"):
        open_engine(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match=r"max_tokens=8192 leaves no room for a prompt: .* context of 8192 tokens"):
        open_engine(tiny_model)
    with pytest.raises(ConfigError, match=r"sampling\.extra: the engine transformers does not know min_p; known are chat_template_kwargs"):
        open_engine(tiny_model, sampling=Sampling(max_tokens=9, extra={"min_p": 0.1}))
    with pytest.raises(ConfigError, match=r"chat_template_kwargs='no' must be a table"):
        open_engine(tiny_model, sampling=Sampling(max_tokens=9, extra={"chat_template_kwargs": "no"}))
    with pytest.raises(ConfigError, match="device='toaster' is no device"):
        open_engine(tiny_model, device="toaster")


def test_a_model_without_a_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template, so it cannot be asked"):
        open_engine(folder, sampling=FREE)


def test_damaged_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DataError, match="the model cannot be loaded"):
        open_engine(folder, sampling=FREE)


def test_a_device_that_is_not_there_is_refused(tiny_model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(MachineError, match="cannot be put on device 'cuda'"):
        open_engine(tiny_model, sampling=FREE, device="cuda")


def test_without_transformers_the_extra_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tpt_megatron.augment.engines.transformers_model", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python itself marks a module that is not to be had
    with pytest.raises(MachineError, match=r"transformers is not installed; .* pip install 'tpt-megatron\[evaluate\]'"):
        open_engine(tiny_model, sampling=FREE)
