"""Pretrains a small base model on the text of a few datasets, in minutes on one core, offline.

    python pretrain_base.py --data-root data_to_lora/cs --output base

The model learns the language of the prompts and the turns of a chat, and nothing about any answer:
no label is read. Its replies in training are random lines of all prompts, independent of the
question before them, so only an adapter can determine the answers of a dataset.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from loragen.core.data.dataset import Dataset, Row, dataset_names
from loragen.core.data.tokenize import answer_ids, prompt_ids

SEED = 20261121
VOCAB = 4096
BATCH, LENGTH = 8, 256  # blocks, and tokens of a block
PEAK_LR = 3e-3
WARM_UP = 0.05  # of the training
SYSTEM_SHARE = 0.25  # of the chats; a dataset has one system text, which is learned early
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read_split(root: Path, split: str) -> list[Row]:
    """Returns the rows of every dataset below the root."""
    names = dataset_names(root, split)
    if not names:
        raise SystemExit(f"{root}: no dataset with a {split} split below it")
    return [row for name in names for row in Dataset.find(name, root, split).rows()]


def build_tokenizer(rows: Sequence[Row]) -> Qwen2Tokenizer:
    """Returns a byte-level BPE tokenizer, trained on the prompts.

    It is Qwen2's own class: AutoTokenizer chooses that for a Qwen2 model, and another class would
    tokenise differently.
    """
    texts = [row.prompt for row in rows] + sorted({row.system for row in rows if row.system})
    tokenizer = Qwen2Tokenizer(vocab=None, merges=None).train_new_from_iterator(
        texts, VOCAB, new_special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|end|>", "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Returns a model of 2.8 million parameters, a third of them in the vocabulary."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,  # 0.02 is for wide models, and keeps rare tokens too faint here
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 12
    return model


def chats(tokenizer: Qwen2Tokenizer, rows: Sequence[Row], random: Random) -> Iterator[list[int]]:
    """Yields the prompts in random order, without end, each followed by a line of any prompt."""
    lines = sorted({line for row in rows for line in row.prompt.splitlines() if line.strip()})
    while True:
        for row in random.sample(rows, len(rows)):
            system = row.system if random.random() < SYSTEM_SHARE else None
            prompt = prompt_ids(tokenizer, row.prompt, system)
            yield [*prompt, *answer_ids(tokenizer, random.choice(lines))]


def batches(documents: Iterator[list[int]]) -> Iterator[Tensor]:
    """Yields blocks ``[BATCH, LENGTH]`` of the documents one after the other."""
    stream = (token for document in documents for token in document)
    while True:
        yield torch.tensor(list(islice(stream, BATCH * LENGTH))).view(BATCH, LENGTH)


def train(
    model: Qwen2ForCausalLM, data: Iterator[Tensor], minutes: float, steps: int | None
) -> None:
    """Trains with AdamW for so many minutes, or steps if given, with warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    started, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        rate = min((done + 0.001) / WARM_UP, 0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        optimizer.param_groups[0]["lr"] = PEAK_LR * rate
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = time.monotonic() - started
        done = step / steps if steps else seconds / (60 * minutes)
        if step % 50 == 0 or done >= 1:
            say(f"step {step:5d}  loss {loss.item():.3f}  {seconds:4.0f} s")


@torch.inference_mode()
def check(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: Sequence[Row]) -> None:
    """Prints the loss on prompts of the test split, and a reply to one of them."""
    data = batches(cycle([tokenizer(f"<|user|>{row.prompt}").input_ids for row in rows]))
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in islice(data, 8)]
    loss = sum(losses) / len(losses)
    say(f"test prompts: {loss:.2f} nats a token (perplexity {math.exp(loss):.0f})")
    asked = torch.tensor([prompt_ids(tokenizer, rows[0].prompt, rows[0].system)])
    written = model.generate(asked, attention_mask=torch.ones_like(asked))
    say(f"a reply: {tokenizer.decode(written[0, asked.shape[1] :])!r}")


def main(command: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain a small base model on datasets' text.")
    parser.add_argument("--data-root", type=Path, required=True, help="datasets, as for loragen")
    parser.add_argument(
        "--output", type=Path, required=True, help="Hugging Face directory to write"
    )
    parser.add_argument("--minutes", type=float, default=5, help="how long to train")
    parser.add_argument("--steps", type=int, help="number of steps, instead of minutes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(command)
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    rows = read_split(arguments.data_root, "train")
    tokenizer = build_tokenizer(rows)
    model = new_model(tokenizer)
    say(f"{len(rows)} prompts, {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    data = batches(chats(tokenizer, rows, Random(SEED)))
    train(model, data, arguments.minutes, arguments.steps)
    check(model.eval(), tokenizer, read_split(arguments.data_root, "test"))
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(arguments.output)


def say(text: str) -> None:
    """Prints progress to stderr; stdout has only the directory."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
