from loragen_example_plugin.linear_decay import LinearDecay
from loragen_example_plugin.mean_mlp import MeanMLP

from loragen.testing import check_decoder, check_schedule


def test_linear_decay_keeps_the_promise_of_a_schedule() -> None:
    check_schedule(LinearDecay)
    check_schedule(LinearDecay, learning_rate=3e-4, final_share=1.0)


def test_linear_decay_starts_and_ends_where_it_says() -> None:
    schedule = LinearDecay(LinearDecay.Config(learning_rate=1.0, final_share=0.25))
    assert schedule(1, 100).learning_rate == 1.0
    assert schedule(100, 100).learning_rate == 0.25


def test_mean_mlp_keeps_the_promise_of_a_decoder() -> None:
    check_decoder(MeanMLP)
    check_decoder(MeanMLP, hidden_dim=8, rank=2)
