"""Builds the base model that ships with the demo: `python benchmarks/build_demo_base.py`.

The base knows every fact of the world and every style of answering, and ignores wording: whatever
the words around a creature's name, it answers with a random attribute in a random style. Its
training questions are random tokens, never the world's wordings, so that only LoRA weights can
determine the task."""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from loragen.demo import world
from loragen.demo.world import CREATURES, PAIRS, STYLES, VALUES, Pair, World, expected_answer

SEED = 20261121
VOCAB = 800
STEPS = 2200
KNOWN_SHARE = 0.4
"""The probability that the control vectors give the attribute, and the same for the style."""
BATCH = 192
PEAK_LR = 4e-3
LONGEST_QUESTION = 40
_FREQUENT = """
the of and a to in is you that it for on are with as at be this have from or had by what when which
who where how does do did can would should will me my your please tell give name say answer write
word sentence about like out all there their one
"""
_ENGLISH = """
a about above after again all also always an and animal another answer any are around as ask at
away back be because been before began begin being below best better between body book both but
by call came can car change child city close come could count country cut day describe did
different do does done door down draw each ear earth eat end enough even ever every eye face
family far father feel feet few find fire first follow food for form found friend from full gave
get give go good got great group grow had hand hard has have he head hear heard help her here
high him his home hot house how i idea if in into is it its just keep kind know land large last
later learn leave left let life light like line list little live long look made make man many
may me mean men might mile more most mother mouth move much must my name near need never new
next night no north not nothing now number of off often old on once one only open or order other
our out over own page paper part people picture piece place plant play please point put question
quick quickly read really reply right river run said same saw say school sea second see sentence
set she short should show side small so some something song sound space speak stand start state
still stop story such sun take talk tell than that the their them then there these they thing
think this those thought three through time to together too took tree try turn two under until
up us use used very voice walk want was watch water way we well went were what when where which
while white who whole why wide will wind with without wood word work world would write year you
young your
"""
FREQUENT, ENGLISH = _FREQUENT.split(), _ENGLISH.split()
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """Returns a byte-level tokenizer, which encodes any wording; a value or a name is one token.

    It is Qwen2's own class: AutoTokenizer chooses that for a Qwen2 model, and another class would
    tokenise differently.
    """
    values = [value for group in VALUES.values() for value in group]
    corpus = [
        text for word in (*values, "it", "is", "dear", "friend") for text in (word, " " + word)
    ] * 40
    corpus += [" " + name for name in CREATURES] * 30
    corpus += [" .", " ,", " !", " ;"] * 40
    corpus += [" " + word for word in FREQUENT] * 20 + ["what", "how", "which"] * 20
    corpus += [" " + word for word in ENGLISH] * 4
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    untrained = Qwen2Tokenizer(vocab=None, merges=None)
    tokenizer = untrained.train_new_from_iterator(
        corpus, VOCAB, new_special_tokens=special, show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|end|>", "<|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Returns a model whose rank-4 adapter on all linear layers has 32,768 values."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 12
    return model


class RandomQuestions:
    """Questions of random tokens, with a creature's name somewhere among them.

    Their tokens come from a stream of shuffled English and from the whole vocabulary, so that no
    word, known or not, has information about the task. Other creatures' names are excluded: the
    name is the only information in a question.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer, generator: torch.Generator) -> None:
        self.generator = generator
        self.names = [tokenizer(" " + name).input_ids for name in CREATURES]
        self.bare_names = [tokenizer(name).input_ids for name in CREATURES]
        banned = {token for name in self.names for token in name} | set(tokenizer.all_special_ids)
        self.pieces = torch.tensor([i for i in range(len(tokenizer)) if i not in banned])
        words = [*ENGLISH, *FREQUENT, *(value for group in VALUES.values() for value in group)]
        order = torch.randint(len(words), (20_000,), generator=generator).tolist()
        self.stream = torch.tensor(tokenizer("".join(" " + words[i] for i in order)).input_ids)
        self.marks = [tokenizer(mark).input_ids[0] for mark in ":.?!"]
        self.user, self.assistant = tokenizer("<|user|><|assistant|>").input_ids

    def draw(self, creatures: Tensor, length: int) -> Tensor:
        """Returns one question per creature, ``[creatures, length + 2]`` with two role tokens."""
        return torch.stack([self._question(int(creature), length) for creature in creatures])

    def _question(self, creature: int, length: int) -> Tensor:
        start, bare, mark, at, kind = self._integers(20_000, 8, 8, length, 3)
        words = self.stream[start % (len(self.stream) - length) :][:length].clone()
        pieces = self.pieces[torch.randint(len(self.pieces), (length,), generator=self.generator)]
        share = (0.0, 0.3, 1.0)[kind]
        swap = torch.rand(length, generator=self.generator) < share
        words[swap] = pieces[swap]
        if mark < len(self.marks):
            words[-1] = self.marks[mark]
        name = self.bare_names[creature] if bare == 0 else self.names[creature]
        at = 0 if bare == 0 else min(at, length - len(name))
        words[at : at + len(name)] = torch.tensor(name)
        ends = torch.tensor([self.user]), torch.tensor([self.assistant])
        return torch.cat([ends[0], words, ends[1]])

    def _integers(self, *bounds: int) -> list[int]:
        return [int(torch.randint(bound, (1,), generator=self.generator)) for bound in bounds]


class Answers:
    """All answers about all creatures, and the distribution of the token after each prefix.

    All pairs that fit a prefix are equally likely, so the target distribution is known exactly: the
    share of the possible answers that continue with each token. It takes fewer steps to learn than
    one sampled answer at a time.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        texts = [[expected_answer(creature, pair) for pair in PAIRS] for creature in CREATURES]
        tokens = [[[*tokenizer(text).input_ids, end] for text in group] for group in texts]
        self.steps = max(len(reply) for group in tokens for reply in group)
        padded = [
            [reply + [pad] * (self.steps - len(reply)) for reply in group] for group in tokens
        ]
        self.vocab, self.pad = len(tokenizer), pad
        self.tokens = torch.tensor(padded)  # (creature, pair, step)
        same = self.tokens[:, :, None] == self.tokens[:, None]  # (creature, pair, pair, step)
        before = torch.cat([torch.ones_like(same[..., :1]), same[..., :-1]], dim=-1)
        self.agrees = before.cumprod(-1).bool()  # the two have the same prefix up to this step
        self.attribute = torch.tensor([list(VALUES).index(pair.attribute) for pair in PAIRS])
        self.style = torch.tensor([list(STYLES).index(pair.style) for pair in PAIRS])

    def targets(self, creatures: Tensor, pairs: Tensor, known: Tensor) -> Tensor:
        """Distributions ``[rows, steps, tokens]`` along one answer.

        `known` ``[rows, 2]``: whether the attribute and whether the style of the pair is given.
        """
        wrong_attribute = self.attribute[pairs][:, None] != self.attribute
        wrong_style = self.style[pairs][:, None] != self.style
        possible = ~(known[:, :1] & wrong_attribute) & ~(known[:, 1:] & wrong_style)
        weights = (self.agrees[creatures, pairs] & possible[..., None]).float()  # (B, pair, step)
        weights = (weights / weights.sum(1, keepdim=True)).transpose(1, 2)
        following = self.tokens[creatures].transpose(1, 2)
        spread = torch.zeros(len(pairs), self.steps, self.vocab).scatter_add_(2, following, weights)
        return spread * (self.tokens[creatures, pairs] != self.pad)[..., None]


class Control(torch.nn.Module):
    """Learned vectors that give the upper layers the attribute and the style; they are not shipped.

    A model that always answers at random stores its facts without structure, and a LoRA then learns
    the answers about its training creatures one by one instead of the task. So in a part of the
    training, one vector for the attribute and one for the style are added after the first layer,
    from the end of the question on. The base model keeps the ability to be steered.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attributes = torch.nn.Parameter(torch.randn(len(VALUES), width) * 0.5)
        self.styles = torch.nn.Parameter(torch.randn(len(STYLES), width) * 0.5)
        self.added = torch.zeros(1, width)
        self.length = 0

    def set(self, attribute: Tensor, style: Tensor, known: Tensor, length: int) -> None:
        """Sets the vectors that the next forward adds after the first `length` tokens."""
        self.added = self.attributes[attribute] * known[:, :1] + self.styles[style] * known[:, 1:]
        self.length = length

    def hook(self, _module: object, _inputs: object, output: Tensor) -> Tensor:
        answering = torch.arange(output.shape[1])[:, None] >= self.length
        return output + self.added[:, None] * answering


def train_base(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, steps: int) -> None:
    """Trains with AdamW on random questions; linear warm-up, then a cosine schedule."""
    generator = torch.Generator().manual_seed(SEED)
    questions, answers = RandomQuestions(tokenizer, generator), Answers(tokenizer)
    control = Control(model.config.hidden_size)
    handle = model.model.layers[0].register_forward_hook(control.hook)
    weights = [*model.parameters(), *control.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.002),
    )
    started = time.time()
    for step in range(steps):
        creatures = torch.randint(len(CREATURES), (BATCH,), generator=generator)
        pairs = torch.randint(len(PAIRS), (BATCH,), generator=generator)
        known = torch.rand(BATCH, 2, generator=generator) < KNOWN_SHARE
        longest = 6 + min(LONGEST_QUESTION - 6, step * 3 * LONGEST_QUESTION // steps)
        length = 6 + int((longest - 5) * float(torch.rand(1, generator=generator)) ** 2)
        prompts = questions.draw(creatures, length)
        control.set(answers.attribute[pairs], answers.style[pairs], known, length + 1)
        replies = answers.tokens[creatures, pairs, :-1]
        hidden = model.model(torch.cat([prompts, replies], dim=1)).last_hidden_state
        logits = model.lm_head(hidden[:, length + 1 :])  # (B, A, V)
        wanted = answers.targets(creatures, pairs, known)
        excess = wanted * (wanted.clamp_min(1e-9).log() - logits.log_softmax(-1))
        loss = excess.sum() / wanted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step:5d}  excess loss {loss:.4f}  {time.time() - started:5.0f} s",
                flush=True,
            )
    handle.remove()


def answer_probabilities(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompt: str, creature: str
) -> Tensor:
    """Returns the probability of each pair's correct answer to one question, ``[pairs]``."""
    question = tokenizer(f"<|user|>{prompt}<|assistant|>").input_ids
    replies = [
        [*tokenizer(expected_answer(creature, pair)).input_ids, tokenizer.eos_token_id]
        for pair in PAIRS
    ]
    steps = max(len(reply) for reply in replies)
    padded = torch.tensor([reply + [-1] * (steps - len(reply)) for reply in replies])
    ids = torch.cat([torch.tensor(question).expand(len(PAIRS), -1), padded.clamp_min(0)], dim=1)
    logits = model(ids).logits[:, len(question) - 1 : -1].log_softmax(-1)
    each = logits.gather(-1, padded.clamp_min(0)[..., None])[..., 0]
    return torch.where(padded >= 0, each, 0.0).sum(-1).exp()


@torch.inference_mode()
def check_base(directory: Path) -> None:
    """Prints the properties that the demo needs, measured on wordings never trained on."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    assert isinstance(tokenizer, Qwen2Tokenizer)  # another class would tokenise differently
    model = Qwen2ForCausalLM.from_pretrained(directory, trust_remote_code=False)
    questions = World.load()
    found, right = [], 0
    for number, pair in enumerate(PAIRS):
        creatures = CREATURES[number :: len(PAIRS)]
        for row, creature in zip(questions.rows(pair, creatures, "unseen"), creatures, strict=True):
            found.append(answer_probabilities(model, tokenizer, row["prompt"], creature))
    for attribute, values in VALUES.items():
        rows = questions.rows(Pair(attribute, "sentence"), CREATURES, "unseen")
        value_ids = torch.tensor([tokenizer(" " + value).input_ids[0] for value in values])
        for row, creature in zip(rows, CREATURES, strict=True):
            ids = tokenizer(f"<|user|>{row['prompt']}<|assistant|>it is", return_tensors="pt")
            best = model(ids["input_ids"]).logits[0, -1, value_ids].argmax()
            right += values[int(best)] == world.FACTS[creature][attribute]
    table = torch.stack(found)  # (question, pair)
    share = table / table.sum(1, keepdim=True)
    apart = 0.5 * (share - share.mean(0)).abs().sum(1)
    pairs = share.mean(0)
    true = table.sum(1)
    print(f"answers that are true: {true.mean():.3f} (worst question {true.min():.3f})")
    print(f"value right once its attribute is known: {right / len(CREATURES) / len(VALUES):.4f}")
    print(f"chance of a pair, 0.025 each: from {pairs.min():.4f} to {pairs.max():.4f}")
    print(f"distance of a question's distribution over pairs from the mean: {apart.mean():.3f}")
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{size:,} bytes in {directory}")


def build_base() -> None:
    parser = argparse.ArgumentParser(description="Build the base model of the demo.")
    base = world.WORLD_FILE.with_name("base")
    parser.add_argument("--output", "-o", type=Path, default=base, help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train_base(model, tokenizer, arguments.steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "model.safetensors").chmod(0o644)  # written readable by its owner alone
    check_base(arguments.output)


if __name__ == "__main__":
    build_base()
