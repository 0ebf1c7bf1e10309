"""Models whose every word is known beforehand, and models that guess numbers: for tests of what is made of what a model writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOD = "<|endoftext|>"
VOCABULARY = 700


def make_tokenizer(words: Sequence[str], texts: Iterable[str] = ()) -> Tokenizer:
    """Return byte-level BPE, trained on `texts`, in which every one of `words` is one token wherever it stands."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ByteLevel.alphabet(), special_tokens=[EOD], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def chain_model(folder: Path, words: Sequence[str], texts: Iterable[str] = (), positions: int = 4096, **generation: Any) -> Path:
    """Write a model folder: it says the second of `words` after the first, the third after the second, ..., and ends the document after the last.

    A word may come again where what follows is the same, or at the end. `generation`: of generation_config.json.
    """
    distinct = list(dict.fromkeys(words))
    tokenizer = make_tokenizer(distinct, texts)
    ids = {word: tokenizer.token_to_id(word) for word in distinct}
    size, eod = tokenizer.get_vocab_size(), tokenizer.token_to_id(EOD)
    hidden = 8 * (len(distinct) // 8 + 1)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": size, "hidden_size": hidden, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"max_position_embeddings": positions, "eos_token_id": eod, "bos_token_id": None, "tie_word_embeddings": False},
        )
    )
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for place, word in enumerate(distinct):
            model.model.embed_tokens.weight[ids[word], place] = 1.0
        follow = {word: ids[after] for word, after in zip(reversed(words[:-1]), reversed(words[1:]), strict=True)}  # the first one counts
        for place, word in enumerate(distinct):
            model.lm_head.weight[follow.get(word, eod), place] = 1.0
    model.generation_config.update(eos_token_id=eod, **generation)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD, clean_up_tokenization_spaces=False).save_pretrained(folder)
    return folder


def guesser(tokenizer: Tokenizer, words: Sequence[str], config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights that writes `words` only, in an order that depends on all that it read."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1 if "norm" in name else 0.4)
        with torch.no_grad():
            chosen = [tokenizer.token_to_id(word) for word in words]
            weight = torch.zeros_like(model.lm_head.weight)
            weight[chosen] = model.lm_head.weight[chosen]
            model.lm_head.weight.copy_(weight)
    return model.eval()
