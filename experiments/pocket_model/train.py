"""Train a pocket model: its tokenizer, then a small Llama from random weights, on the corpus of `corpus.py`.

    python -m experiments.pocket_model.train --out /tmp/pocket

The README beside this file has the commands that made the bundled model.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.pocket_model.corpus import Conversation, conversations, load_grammar

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (PAD, BOS, END, *ROLES.values())
Batch = tuple[torch.Tensor, torch.Tensor]  # ids [B, T], weights [B, T]
RAW_GAP = "\n\n"
PROMPT_WEIGHT = 0.1
POOL = 4096
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab_size: int, n_conversations: int = 20_000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus. It encodes any UTF-8 text and decodes it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    drawn = itertools.islice(conversations(seed), n_conversations)
    texts = (turn.text for conversation in drawn for turn in conversation.turns)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    bos = (BOS, id_of(tokenizer, BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return int(found)


# --- examples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedTokens:
    """Token ids of a conversation, and the weight of each token in the loss."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer) -> WeightedTokens:
    """Encode as the chat template does; the assistant's tokens and end token have weight 1, others PROMPT_WEIGHT."""
    if conversation.raw:
        return _encode_raw(conversation, tokenizer)
    ids, weights = [id_of(tokenizer, BOS)], [0.0]
    for turn in conversation.turns:
        text_ids = [*tokenizer.encode(turn.text, add_special_tokens=False).ids, id_of(tokenizer, END)]
        ids += [id_of(tokenizer, ROLES[turn.role]), *text_ids]
        weights += [0.0, *[1.0 if turn.role == "assistant" else PROMPT_WEIGHT] * len(text_ids)]
    return WeightedTokens(tuple(ids), tuple(weights))


def _encode_raw(conversation: Conversation, tokenizer: Tokenizer) -> WeightedTokens:
    """Encode question and answer as plain text with a blank line between, without a chat template."""
    prompt, answer = (turn.text for turn in conversation.turns)
    encoding = tokenizer.encode(prompt + RAW_GAP + answer, add_special_tokens=False)
    weights = [1.0 if start >= len(prompt) else PROMPT_WEIGHT for start, _ in encoding.offsets]
    ids = [id_of(tokenizer, BOS), *encoding.ids, id_of(tokenizer, END)]
    return WeightedTokens(tuple(ids), (0.0, *weights, 1.0))


def batches(
    seed: int,
    tokenizer: Tokenizer,
    batch_tokens: int,
    max_tokens: int = 640,
    stream: Iterator[Conversation] | None = None,
) -> Iterator[Batch]:
    """Yield batches (ids [B, T], weights [B, T]) of similar lengths without end, right-padded to a multiple of 16.

    `stream` replaces the corpus's conversations.
    """
    rng, stream = random.Random(seed), stream or conversations(seed)
    pad = id_of(tokenizer, PAD)
    while True:
        pool = [encode_conversation(next(stream), tokenizer) for _ in range(POOL)]
        pool = sorted((one for one in pool if len(one.token_ids) <= max_tokens), key=lambda one: len(one.token_ids))
        groups = list(_groups(pool, batch_tokens))
        rng.shuffle(groups)
        for group in groups:
            yield _padded(group, pad)


def _groups(pool: Sequence[WeightedTokens], batch_tokens: int) -> Iterator[Sequence[WeightedTokens]]:
    start = 0
    while start < len(pool):
        size = max(1, batch_tokens // len(pool[start].token_ids))
        yield pool[start : start + size]
        start += size


def _padded(group: Sequence[WeightedTokens], pad: int) -> Batch:
    width = math.ceil(max(len(one.token_ids) for one in group) / 16) * 16
    ids_BT = torch.tensor([[*one.token_ids, *[pad] * (width - len(one.token_ids))] for one in group])
    weights_BT = torch.tensor([[*one.weights, *[0.0] * (width - len(one.weights))] for one in group])
    return ids_BT, weights_BT


# --- training -------------------------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """Build a Llama with random weights, tied embeddings and one attention head for every 32 channels."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # on a CPU, twice as fast to train as the fused kernel
    return LlamaForCausalLM(config)


def weighted_loss(model: Callable[..., Any], ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean cross-entropy of the next token. Right padding needs no mask: attention is causal."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    losses = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
    weights = weights_BT[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices (Jordan et al., 2024) and AdamW for the embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, n_steps: int, warmup: int = 50) -> float:
    """Return the learning rate over its peak: a linear warm-up, then half a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def descend(
    model: torch.nn.Module,
    opts: Sequence[torch.optim.Optimizer],
    stream: Iterable[Batch],
    measure: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]],
    n_steps: int,
    *,
    every: int = 50,
    warmup: int = 50,
) -> Iterator[tuple[int, list[float]]]:
    """Train for `n_steps` batches; yield (step, means of the figures since the last yield) every `every`.

    `measure` returns the figures of a batch, the loss first.
    """
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(opt, lambda step: schedule(step, n_steps, warmup=warmup)) for opt in opts
    ]
    rows: list[list[float]] = []
    for step, (ids_BT, weights_BT) in enumerate(itertools.islice(stream, n_steps), start=1):
        figures = measure(ids_BT, weights_BT)
        figures[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, scheduler in zip(opts, schedulers, strict=True):
            opt.step()
            scheduler.step()
            opt.zero_grad()
        rows.append([figure.item() for figure in figures])
        if step % every == 0:
            yield step, [sum(column) / every for column in zip(*rows, strict=True)]
            rows.clear()


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, options: argparse.Namespace
) -> Iterator[tuple[int, list[float]]]:
    """Train for `options.steps` batches; yield (step, [loss, tokens a batch]) every 50."""
    run: Callable[..., Any] = torch.compile(model, dynamic=True) if options.compile else model
    stream = batches(options.seed, tokenizer, options.batch_tokens)
    return descend(
        model,
        optimizers(model, options.lr),
        stream,
        lambda ids_BT, weights_BT: (weighted_loss(run, ids_BT, weights_BT), torch.tensor(ids_BT.numel())),
        options.steps,
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the weights in bfloat16, and the tokenizer with its chat template."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    half = copy.deepcopy(model).bfloat16()
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start_new(options: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Train a tokenizer and draw random weights."""
    tokenizer = train_tokenizer(options.seed, options.vocab_size)
    return tokenizer, new_model(tokenizer, options.hidden, options.layers)


def start_from(folder: Path) -> tuple[Any, LlamaForCausalLM]:
    """Load a trained model and its tokenizer, to continue."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    return tokenizer, model.train()


def new_parser(doc: str, what: str, **defaults: float) -> argparse.ArgumentParser:
    """Return a parser of --out (the folder of `what`) and of number options with these defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the trained {what}")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser


def begin(options: argparse.Namespace) -> None:
    """Set the number of threads and the seed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(
        __doc__,
        "model",
        steps=2600,
        batch_tokens=4096,
        lr=4e-3,
        seed=20,
        threads=2,
        hidden=192,
        layers=6,
        vocab_size=2048,
    )
    parser.add_argument("--init", type=Path, help="go on from this model and tokenizer, instead of from random weights")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Train and save, with a line of progress every 50 steps."""
    options = parse_options()
    begin(options)
    load_grammar()
    tokenizer, model = start_from(options.init) if options.init else start_new(options)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    start = time.perf_counter()
    n_tokens = 0.0
    for step, (loss, batch_tokens) in train(model, tokenizer.backend_tokenizer, options):
        seconds, n_tokens = time.perf_counter() - start, n_tokens + 50 * batch_tokens
        print(f"step {step:5d}  loss {loss:.4f}  {n_tokens / seconds:,.0f} tokens/s  {seconds:,.0f} s", flush=True)
        if step % 500 == 0:
            save(model, tokenizer, options.out / "last")
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
