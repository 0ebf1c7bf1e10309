"""A language model small enough to be trained within a test session, that thinks before it answers.

Byte-level BPE over the standard library's own documentation, two Qwen3 layers, and half a minute of training on chats with
long user messages: it writes `<think>`, some sentences drawn from a small grammar, `</think>`, and an answer. What it
thinks has nothing to do with what it was asked; that it thinks, ends, and varies is what tests need.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

VOCABULARY = 1088
POSITIONS = 8192
LEARNED = 0.8

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- if open_thought is defined and open_thought %}{{ '<think>\\n' }}"
    "{%- endif %}{%- endif %}"
)
"""ChatML. With `open_thought` it opens the thought in the prompt, as templates of DeepSeek-R1-Distill and QwQ do."""

_MODULES = ("argparse", "difflib", "textwrap", "logging", "statistics", "optparse", "cmd", "random", "zipfile", "tarfile", "smtplib", "turtle")
_OPENINGS = ("Let me see", "First I read the text", "The passage is short", "I look at the main point", "What does it say")
_SUBJECTS = ("the author", "the text", "the first part", "this sentence", "the example", "the argument", "the reader")
_VERBS = ("explains", "repeats", "assumes", "shows", "leaves out", "asks for", "depends on")
_OBJECTS = ("the rule", "a number", "one more step", "the reason", "what comes next", "the same idea", "a simple case")
_ANSWERS = ("It is clear now.", "The answer follows.", "That is all.", "Yes, it holds.")


def _prose() -> list[str]:
    """Return paragraphs from docstrings of the standard library: English that every Python brings along."""
    paragraphs: list[str] = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                paragraphs += [part for part in text.split("\n\n") if len(part) > 60]
    return paragraphs


def _thought(rng: random.Random) -> str:
    sentences = (f"So {rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}." for _ in range(rng.randint(1, 4)))
    return " ".join([rng.choice(_OPENINGS) + ".", *sentences])


def _reply(rng: random.Random) -> str:
    return f"<think>\n{_thought(rng)}\n</think>\n\n{rng.choice(_ANSWERS)}"


def _make_tokenizer(prose: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    rng = random.Random(0)
    tokenizer.train_from_iterator([*prose, *(_reply(rng) for _ in range(500))], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=POSITIONS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(folder: Path, seed: int = 0, steps: int = 200) -> None:
    """Train the model and save it with its tokenizer and chat template to `folder` (1.8 MB)."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    prose = _prose()
    tokenizer = _make_tokenizer(prose)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take several times as long on a busy machine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=POSITIONS,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )
        _train(model, _Chats(tokenizer, prose, random.Random(seed)), steps)
    torch.set_num_threads(threads)
    # transformers serve samples only where the folder says so, whatever temperature the request has.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Chats:
    """Batches of chats, each row filled to its end: what the user says, then the reply."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prose: list[str], rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        spoken = [*prose, *(" ".join(rng.sample(words := text.split(), len(words))) for text in prose[::3])]
        spoken += [f"{rng.randint(0, 99999)}. <document> ## Thoughts {text[:80]}" for text in prose[::7]]
        self._spoken = [self._ids(text + "\n\n") for text in spoken]
        self._before, self._after = self._ids("<|im_start|>user\n"), self._ids("<|im_end|>\n<|im_start|>assistant\n")

    def batch(self) -> tuple[list[list[int]], list[int]]:
        """Return rows of equal length, some 2,048 tokens in all, and how long the reply at the end of each is."""
        length = self._rng.choice((80, 96, 128, 192, 256, 384, 512, 1024, 2048))
        replies = [self._ids(_reply(self._rng) + "<|im_end|>") for _ in range(2048 // length)]
        return [self._row(reply, length) for reply in replies], [len(reply) for reply in replies]

    def _row(self, reply: list[int], length: int) -> list[int]:
        tokens = length - len(reply) - len(self._before) - len(self._after)
        user: list[int] = []
        while len(user) < tokens:
            user += self._rng.choice(self._spoken)
        return (self._before + user[: max(tokens, 0)] + self._after + reply)[-length:]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _train(model: Qwen3ForCausalLM, chats: _Chats, steps: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    model.train()
    losses: list[float] = []
    for _ in range(steps):
        rows, lengths = chats.batch()
        input_bs = torch.tensor(rows)  # [batch, sequence]
        longest = min(max(lengths), input_bs.shape[1] - 1)
        labels_bs = input_bs[:, -longest:].clone()
        for row, length in enumerate(lengths):
            labels_bs[row, : max(longest - length, 0)] = -100  # only the reply is learned
        logits_bsv = model(input_ids=input_bs, logits_to_keep=longest + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits_bsv.flatten(0, 1), labels_bs.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    last = sum(losses[-10:]) / len(losses[-10:])
    assert last < LEARNED, f"the tiny model did not learn to reply: its loss is {last:.2f}, not below {LEARNED}"


def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this session's tiny model, trained at the first call. For fixtures, which may be several."""
    folder = tmp_path_factory.getbasetemp() / "tiny-model"
    if not folder.is_dir():
        make_tiny_model(unfinished := folder.with_name("tiny-model-unfinished"))
        unfinished.rename(folder)
    return folder


def transformers_serve_command(model_folder: Path, port: str = "{port}") -> list[str]:
    """Return the words that start `transformers serve` (the packages of transformers' extra `serving`) with this model."""
    start = "from transformers.cli.transformers import main; main()"
    return [sys.executable, "-c", start, "serve", str(model_folder), "--host", "127.0.0.1", "--port", port, "--device", "cpu"]


@contextmanager
def running_transformers_serve(model_folder: Path, start_timeout_s: float = 300) -> Iterator[str]:
    """Run `transformers serve` with the model for the length of the block and yield its base URL, up to and including /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="transformers-serve-"))
    (home / "hub").mkdir()  # without it, GET /v1/models answers 500
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    log = home / "log"
    try:
        with log.open("wb") as output:
            server = subprocess.Popen(transformers_serve_command(model_folder, str(port)), env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_it_answers(f"http://127.0.0.1:{port}/health", server, log, start_timeout_s)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(home)


def _wait_until_it_answers(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"transformers serve did not start (exit status {server.poll()}): {log.read_text(errors='replace')[-2000:]}")
