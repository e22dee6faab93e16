import pytest

from loragen.core.errors import UsageError
from loragen.core.generator.places import check_places


@pytest.fixture
def check(gen_config, collection):
    """`check(prompts)`: of a run whose prompts are elsewhere."""
    run = str(collection.runs["colors"])
    return lambda prompts: check_places(gen_config({"sources": [{"run": run, "prompts": prompts}]}))


def test_prompts_may_be_on_the_hub(check):
    check("hub:openai/gsm8k:main")


@pytest.mark.parametrize(
    "prompts, message",
    [("none.txt", "none.txt: no such prompt file"), ("hub:gsm8k", "hub:gsm8k: expected hub:owner")],
)
def test_prompts_that_cannot_be_are_refused(check, prompts, message):
    with pytest.raises(UsageError, match=message):
        check(prompts)
