"""Distil a draft model from pocket: fewer layers, the same tokenizer, trained on pocket's probabilities.

    python -m experiments.pocket_model.distil --out /tmp/draft

The loss covers the assistant's tokens, in the corpus's answers and in answers sampled from pocket. The README beside
this file has the command that made the bundled model.

Legend: B batch, T tokens, D hidden, N tokens of answers in a batch, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.pocket_model.corpus import MODELS, Conversation, Turn, conversations
from experiments.pocket_model.evaluate import answer_all
from experiments.pocket_model.train import batches, begin, descend, new_parser, optimizers, start_from

TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
TEMPERATURES = (1.0, 1.0, 0.7, 0.0)


# --- conversations --------------------------------------------------------------------------------------------------


def own_answers(teacher: Any, tokenizer: Any, seed: int, n: int) -> list[Conversation]:
    """Sample the teacher's answers to single-turn conversations; each batch has one of TEMPERATURES."""
    stream = (one for one in conversations(seed) if not one.raw and one.turns[-2] == _first_user(one))
    found: list[Conversation] = []
    for number, start in enumerate(range(0, n, 256)):
        some = sorted(itertools.islice(stream, min(256, n - start)), key=lambda one: len(_first_user(one).text))
        chats = [[{"role": turn.role, "content": turn.text} for turn in one.turns[:-1]] for one in some]
        texts = answer_all(teacher, tokenizer, chats, temperature=TEMPERATURES[number % len(TEMPERATURES)])
        found += [
            replace(one, turns=(*one.turns[:-1], Turn("assistant", text)))
            for one, text in zip(some, texts, strict=True)
        ]
    return found


def _first_user(conversation: Conversation) -> Turn:
    return next(turn for turn in conversation.turns if turn.role == "user")


def mixed(own: list[Conversation], seed: int, share: float) -> Iterator[Conversation]:
    """Yield corpus conversations, replacing `share` of them by ones that the teacher answered."""
    rng, stream = random.Random(seed), conversations(seed)
    while True:
        yield rng.choice(own) if own and rng.random() < share else next(stream)


# --- losses ---------------------------------------------------------------------------------------------------------


def forward_kl(teacher_NV: torch.Tensor, draft_NV: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || draft), mean over tokens."""
    return kl_div(draft_NV.log_softmax(-1), teacher_NV.log_softmax(-1), reduction="batchmean", log_target=True)


def rejected(teacher_NV: torch.Tensor, draft_NV: torch.Tensor) -> torch.Tensor:
    """Return the chance that a proposal is rejected: 1 - sum of min(p, q), the total variation (DistillSpec, 2023)."""
    return 0.5 * (teacher_NV.softmax(-1) - draft_NV.softmax(-1)).abs().sum(-1).mean()


LOSSES = {"kl": forward_kl, "rejected": rejected}


# --- training -------------------------------------------------------------------------------------------------------


def new_draft(teacher: LlamaForCausalLM, options: argparse.Namespace) -> LlamaForCausalLM:
    """Build a Llama of few layers with the teacher's vocabulary; embeddings start from its principal components."""
    config = LlamaConfig(
        **{
            **teacher.config.to_dict(),
            "hidden_size": options.hidden,
            "intermediate_size": options.inner,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.hidden // 32,
            "num_key_value_heads": options.hidden // 32,
            "dtype": "float32",
        }
    )
    config._attn_implementation = "eager"
    draft = LlamaForCausalLM(config)
    weights_VD = teacher.model.embed_tokens.weight.detach()
    directions_DK = torch.linalg.svd(weights_VD - weights_VD.mean(0), full_matrices=False)[2][: options.hidden].T
    start_VK = weights_VD @ directions_DK
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(start_VK * 0.04 / start_VK.std())
    return draft


def answer_logits(model: Any, ids_BT: torch.Tensor, answer_BT: torch.Tensor, body: Callable[..., Any]) -> torch.Tensor:
    """Return the logits of the assistant's tokens: [B, T] -> [N, V]."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        logits: torch.Tensor = model.lm_head(hidden_BTD[:, :-1][answer_BT[:, 1:]])
    return logits.float()


def train(
    draft: LlamaForCausalLM, teacher: LlamaForCausalLM, tokenizer: Any, options: argparse.Namespace
) -> Iterator[tuple[int, list[float]]]:
    """Train for `options.steps` batches; yield (step, [loss, rejection]) every 50."""
    bodies = [torch.compile(one.model, dynamic=True) if options.compile else one.model for one in (draft, teacher)]
    own = own_answers(teacher, tokenizer, options.seed + 1, options.own)
    print(f"{len(own)} answers sampled from the teacher", flush=True)

    def measure(ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer_BT = weights_BT == 1
        with torch.no_grad():
            teacher_NV = answer_logits(teacher, ids_BT, answer_BT, bodies[1])
        draft_NV = answer_logits(draft, ids_BT, answer_BT, bodies[0])
        return LOSSES[options.loss](teacher_NV, draft_NV), rejected(teacher_NV, draft_NV.detach())

    stream = batches(
        options.seed, tokenizer.backend_tokenizer, options.batch_tokens,
        stream=mixed(own, options.seed, options.own_share),
    )  # fmt: skip
    return descend(draft, optimizers(draft, options.lr), stream, measure, options.steps)


def save(draft: LlamaForCausalLM, teacher: Path, folder: Path) -> None:
    """Save the weights in bfloat16, and copy the teacher's tokenizer files."""
    weights = {name: weight.clone() for name, weight in draft.state_dict().items()}
    draft.bfloat16().save_pretrained(folder)
    draft.float().load_state_dict(weights)
    for name in TOKENIZER_FILES:
        shutil.copyfile(teacher / name, folder / name)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    defaults = {"steps": 1500, "batch_tokens": 4096, "hidden": 128, "inner": 448, "layers": 2, "lr": 6e-3}
    parser = new_parser(__doc__, "draft", **defaults, seed=40, threads=1)
    parser.add_argument("--teacher", type=Path, default=MODELS / "pocket")
    parser.add_argument("--init", type=Path, help="go on from this draft, instead of from random weights")
    parser.add_argument("--loss", choices=LOSSES, default="kl")
    parser.add_argument("--own", type=int, default=4096, help="answers that the teacher gives first")
    parser.add_argument("--own-share", type=float, default=0.5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Distil and save, with a line of progress every 50 steps."""
    options = parse_options()
    begin(options)
    tokenizer, teacher = start_from(options.teacher)
    teacher.eval().requires_grad_(False)
    draft = start_from(options.init)[1] if options.init else new_draft(teacher, options)
    print(f"{draft.num_parameters():,} of {teacher.num_parameters():,} parameters", flush=True)
    start = time.perf_counter()
    for step, (loss, lost) in train(draft, teacher, tokenizer, options):
        seconds = time.perf_counter() - start
        print(f"step {step:5d}  loss {loss:.4f}  accepted {1 - lost:.4f}  {seconds:,.0f} s", flush=True)
        if step % 500 == 0:
            save(draft, options.teacher, options.out / "last")
    save(draft, options.teacher, options.out)


if __name__ == "__main__":
    main()
