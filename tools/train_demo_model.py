"""Train the demo checkpoint: a 2.6-million-parameter Mixtral in Hugging Face layout.

The training text is what `fetch_corpus.py` gathers: the King James Bible, Jane Austen's novels,
Moby-Dick, the State of the Union addresses and Shakespeare's sonnets. All of it is in the public
domain, so the checkpoint can be shared without conditions on its data.

The checkpoint in models/demo took one H200 GPU 1.2 minutes (175 million tokens, 35 passes over the
text). More passes only memorise: five minutes reach a worse validation loss.

    python tools/fetch_corpus.py
    python tools/train_demo_model.py --minutes 1.2

A smoke test on a CPU:

    python tools/train_demo_model.py --device cpu --steps 2 --batch-size 2 --sequence-length 256 \
        --output build/demo
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 2048
ROPE_THETA = 10_000.0

HELD_OUT_FRACTION = 0.01
FINAL_LEARNING_RATE_FRACTION = 0.02
WARM_UP_FRACTION = 0.03
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
BALANCE_WEIGHT = 0.01  # small: every expert gets work, but not the same amount

PROMPTS = [
    "In the beginning",
    "It was the opinion of Mr. Darcy that",
    "Fellow-Citizens of the Senate and House of Representatives:",
]

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Corpus:
    training: list[str]
    held_out: list[str]


def read_corpus(folder: Path, seed: int) -> Corpus:
    """Hold out about 1% of every source by whole documents, and shuffle the rest together."""
    rng = random.Random(seed)
    corpus = Corpus([], [])
    for path in sorted(folder.glob("*.txt")):
        documents = [text.strip() for text in path.read_text().split(END_OF_TEXT)]
        rng.shuffle(documents)
        wanted = HELD_OUT_FRACTION * sum(map(len, documents))
        while wanted > 0:
            corpus.held_out.append(documents.pop())
            wanted -= len(corpus.held_out[-1])
        corpus.training.extend(documents)
    if not corpus.training:
        raise typer.BadParameter(f"no text files in {folder}; run fetch_corpus.py first")
    rng.shuffle(corpus.training)
    return corpus


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """One stream of token ids, every document preceded and followed by the end-of-text token."""
    stream = [tokenizer.eos_token_id]
    for ids in tokenizer(documents, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream)


def build_model(experts_implementation: str, device: str) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        num_experts_per_tok=2,
        router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, experts_implementation=experts_implementation
    )
    return model.to(device)


def expert_shares(router_logits: Tensor, experts_per_token: int) -> Tensor:
    """The fraction of all routed tokens that each expert of one layer receives."""
    chosen = router_logits.topk(experts_per_token).indices.flatten()
    counts = torch.zeros(router_logits.shape[-1], device=router_logits.device)
    ones = torch.ones(len(chosen), device=router_logits.device)
    return counts.index_add_(0, chosen, ones) / len(chosen)


def balance_loss(router_logits: tuple[Tensor, ...], experts_per_token: int) -> Tensor:
    """Switch-style load balancing, each layer on its own; 1.0 is perfectly even.

    The library's own loss sums expert use over the layers, so it would accept a layer with idle
    experts as long as another layer favours the same expert numbers.
    """
    losses = []
    for logits in router_logits:
        mean_probability = logits.float().softmax(-1).mean(0)
        shares = expert_shares(logits.detach(), experts_per_token)
        losses.append(logits.shape[-1] * (shares * mean_probability).sum())
    return torch.stack(losses).mean()


class Bfloat16Trainer:
    """AdamW on float32 master copies of the model's bfloat16 weights.

    The model then trains with exactly the weights that are saved, and its experts stay in the
    type that the grouped matrix product is fast for (autocast does not reach it).
    """

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.model = model
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        matrices = [master for master in self.masters if master.ndim > 1]
        vectors = [master for master in self.masters if master.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, tokens: Tensor, learning_rate: float) -> Tensor:
        """One update on a batch of token windows; returns the language-model loss."""
        output = self.model(input_ids=tokens, output_router_logits=True, use_cache=False)
        loss = next_token_loss(output.logits, tokens)
        experts_per_token = self.model.config.num_experts_per_tok
        balance = balance_loss(output.router_logits, experts_per_token)
        (loss + BALANCE_WEIGHT * balance).backward()

        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, GRADIENT_CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    predictions = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predictions, tokens[:, 1:].flatten())


def learning_rate_fraction(progress: float) -> float:
    """Linear warm-up to the peak rate, then a cosine down to a small fraction of it."""
    if progress < WARM_UP_FRACTION:
        return progress / WARM_UP_FRACTION
    cosine = (1 + math.cos(math.pi * (progress - WARM_UP_FRACTION) / (1 - WARM_UP_FRACTION))) / 2
    return FINAL_LEARNING_RATE_FRACTION + (1 - FINAL_LEARNING_RATE_FRACTION) * cosine


def budget_progress(minutes: float, steps: int | None) -> Iterator[float]:
    """The fraction of the budget used before each step: of the steps if given, else of the time."""
    if steps is not None:
        yield from ((step + 1) / (steps + 1) for step in range(steps))
        return
    start = time.monotonic()
    while (progress := (time.monotonic() - start) / (minutes * 60)) < 1:
        yield progress


def random_windows(stream: Tensor, batch_size: int, length: int) -> Tensor:
    starts = torch.randint(len(stream) - length, (batch_size, 1), device=stream.device)
    return stream[starts + torch.arange(length, device=stream.device)]


def consecutive_windows(stream: Tensor, length: int) -> Tensor:
    count = len(stream) // length
    return stream[: count * length].view(count, length)


@torch.no_grad()
def validation_loss(model: MixtralForCausalLM, stream: Tensor, length: int) -> float:
    model.eval()
    batches = consecutive_windows(stream, length).split(8)
    total = sum(
        next_token_loss(model(input_ids=batch, use_cache=False).logits, batch) * len(batch)
        for batch in batches
    )
    model.train()
    return float(total / sum(map(len, batches)))


def train(
    model: MixtralForCausalLM,
    training: Tensor,
    held_out: Tensor,
    batch_size: int,
    length: int,
    learning_rate: float,
    budget: Iterator[float],
) -> None:
    trainer = Bfloat16Trainer(model)
    losses: list[Tensor] = []
    next_report, next_validation = 0.02, 0.1
    tokens_seen, start = 0, time.monotonic()
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        for step, progress in enumerate(budget, 1):
            windows = random_windows(training, batch_size, length)
            rate = learning_rate * learning_rate_fraction(progress)
            losses.append(trainer.step(windows, rate))
            tokens_seen += windows.numel()
            bar.update(task, completed=progress)

            if progress >= next_report:
                next_report += 0.02
                loss = float(torch.stack(losses).mean())
                losses.clear()
                speed = tokens_seen / (time.monotonic() - start)
                report = f"{progress:4.0%}  step {step:6}  train loss {loss:.4f}"
                if progress >= next_validation:
                    next_validation += 0.1
                    report += f"  val loss {validation_loss(model, held_out, length):.4f}"
                report += f"  {tokens_seen / 1e6:.1f}M tokens  {speed:,.0f} tokens/s"
                bar.console.print(report)


@torch.no_grad()
def report_expert_load(model: MixtralForCausalLM, stream: Tensor, length: int) -> None:
    windows = consecutive_windows(stream, length)[:16]
    router_logits = model(input_ids=windows, output_router_logits=True).router_logits
    for layer, logits in enumerate(router_logits):
        shares = expert_shares(logits, model.config.num_experts_per_tok)
        console.print(
            f"layer {layer} expert load: min {shares.min():.1%}  mean {shares.mean():.1%}"
            f"  max {shares.max():.1%}"
        )


def report_samples(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    for prompt in PROMPTS:
        torch.manual_seed(seed)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=100,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        console.print(f"--- sample\n{text}", markup=False)


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """The hub layout, with the two fields that older readers look for under their older names."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    amend_json(output / "config.json", rope_theta=ROPE_THETA)
    amend_json(output / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def amend_json(path: Path, **fields: object) -> None:
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def verify(output: Path, corpus: Corpus, device: str, length: int, expected_loss: float) -> None:
    """Load the checkpoint as a user would; it must reach the same loss on the same text."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).to(device)
    exotic = "naïve — “quotes” \t\n  Привет 你好 🐋 \u0000"
    if tokenizer.decode(tokenizer(exotic)["input_ids"]) != exotic:
        raise RuntimeError("the saved tokenizer does not round-trip UTF-8 text")
    loss = validation_loss(model, encode(tokenizer, corpus.held_out).to(device), length)
    console.print(f"reloaded from {output}: val loss {loss:.4f}")
    if abs(loss - expected_loss) > 0.005:
        raise RuntimeError(f"the saved model has validation loss {loss}, not {expected_loss}")


def main(
    corpus_folder: Annotated[Path, typer.Option("--corpus")] = Path(".corpus"),
    output: Annotated[Path, typer.Option(help="where the checkpoint goes")] = Path("models/demo"),
    minutes: Annotated[float, typer.Option(help="time budget; the schedule ends with it")] = 1.2,
    steps: Annotated[int | None, typer.Option(help="train so many steps instead")] = None,
    batch_size: int = 32,
    sequence_length: Annotated[int, typer.Option(max=CONTEXT_LENGTH)] = CONTEXT_LENGTH,
    learning_rate: Annotated[float, typer.Option(help="at its peak")] = 6e-3,
    device: str = "cuda",
    experts: Annotated[str, typer.Option(help="grouped_mm or eager")] = "grouped_mm",
    seed: int = 0,
) -> None:
    """Train the demo model and save it."""
    disable_progress_bar()
    torch.manual_seed(seed)
    corpus = read_corpus(corpus_folder, seed)
    tokenizer = train_tokenizer(corpus.training)
    training = encode(tokenizer, corpus.training).to(device)
    held_out = encode(tokenizer, corpus.held_out).to(device)
    model = build_model(experts, device)
    console.print(
        f"{len(training):,} training tokens, {len(held_out):,} held out;"
        f" {model.num_parameters():,} parameters"
    )

    budget = budget_progress(minutes, steps)
    train(model, training, held_out, batch_size, sequence_length, learning_rate, budget)
    loss = validation_loss(model, held_out, sequence_length)
    console.print(f"final val loss {loss:.4f} ({loss / math.log(2):.3f} bits per token)")
    model.eval()
    report_expert_load(model, held_out, sequence_length)
    report_samples(model, tokenizer, seed)
    save(model, tokenizer, output)
    verify(output, corpus, device, sequence_length, loss)


if __name__ == "__main__":
    typer.run(main)
