import pytest

from loragen.core.data.formats import FORMATS, Turn, format_of, question_of
from loragen.core.errors import DataError

TEXTS = ["red", "blue", "green"]
LABELLED = {"text": TEXTS, "label": ["A", "B", "C"]}
NUMBERED = {"text": TEXTS, "label": ["1", "2", "3"]}
LETTERED = "Which?\nA: red\nB: blue\nC: green"


def parsed(document):
    known = format_of(document)
    return known.question(document), known.answer(document)


def said(*pairs, key="messages", role="role", content="content"):
    return {key: [{role: name, content: text} for name, text in pairs]}


@pytest.mark.parametrize(
    "document, prompt, answer",
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompt": "p", "completion": "r"}, "p", "r"),
        ({"query": "p", "response": "r"}, "p", "r"),
        ({"question": "p", "answer": "r"}, "p", "r"),
        ({"instruction": "p", "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": "", "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": None, "output": "r"}, "p", "r"),
        ({"instruction": "p", "input": "i", "output": "r"}, "p\n\ni", "r"),
        ({"instruction": "p", "context": "i", "response": "r"}, "p\n\ni", "r"),
        ({"prompt": "p", "response": "r", "question": "x", "messages": 3}, "p", "r"),
        (said(("user", "p"), ("assistant", "r")), "p", "r"),
    ],
)
def test_a_row_is_recognised_by_its_keys(document, prompt, answer):
    question, given = parsed(document)
    assert (question.prompt, given) == (prompt, answer)
    assert (question.system, question.history, question.choices) == (None, (), None)


@pytest.mark.parametrize(
    "document",
    [
        said(
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "p"), ("assistant", "r")
        ),
        said(
            ("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "p"), ("gpt", "r"),
            key="conversations", role="from", content="value",
        ),
        {"prompt": "p", "response": "r", "system": "s", "history": [["a", "b"]]},
        {"instruction": "p", "output": "r", "system": "s", "history": [["a", "b"]]},
        said(("user", "a"), ("assistant", "b"), ("user", "p"), ("assistant", "r"))
        | {"system": "s"},
    ],
)  # fmt: skip
def test_earlier_turns_are_kept_apart_from_the_last(document):
    question, answer = parsed(document)
    assert (question.prompt, question.system, answer) == ("p", "s", "r")
    assert question.history == (Turn("a", "b"),)


@pytest.mark.parametrize(
    "choices, given",
    [
        *((LABELLED, answer) for answer in ("B",)),
        *((NUMBERED, answer) for answer in ("2", 2)),
        *((TEXTS, answer) for answer in ("B", 1)),
    ],
)
@pytest.mark.parametrize(
    "key, answer",
    [("question", "answerKey"), ("question_stem", "answerKey"), ("question", "answer")],
)
def test_choices_are_lettered_and_the_answer_is_a_letter(choices, given, key, answer):
    question, response = parsed({key: "Which?", "choices": choices, answer: given})
    assert question.prompt == LETTERED
    assert question.choices == ["[A]", "[B]", "[C]"]
    assert response == "[B]"


@pytest.mark.parametrize(
    "document, reason",
    [
        (
            {"question": "q", "choices": TEXTS, "answerKey": "D"},
            "'D' is none of the choices A, B, C",
        ),
        (
            {"question": "q", "choices": TEXTS, "answerKey": "1"},
            "'answerKey': '1' may count from 0",
        ),
        ({"question": "q", "choices": TEXTS, "answerKey": 3}, "3 is none of the choices"),
        ({"question": "q", "choices": TEXTS, "answerKey": -1}, "-1 is none of the choices"),
        ({"question": "q", "choices": TEXTS, "answerKey": True}, "True is none of the choices"),
        (
            {"question": "q", "choices": NUMBERED, "answerKey": 4},
            "4 is none of the choices 1, 2, 3",
        ),
        ({"question": "q", "choices": TEXTS, "answerKey": None}, "None is none of the choices"),
        ({"question": "q", "choices": ["a"], "answerKey": "A"}, "expected 2 to 26 texts"),
        ({"question": "q", "choices": "ab", "answerKey": "A"}, "'choices': expected a list"),
        (
            {"question": "q", "choices": {"text": TEXTS}, "answerKey": "A"},
            "'choices.label': expect",
        ),
        ({"question": "q", "choices": TEXTS}, "'answerKey' is missing"),
        (said(("user", "p")), "the last message is the user's"),
        (said(("user", "p"), ("assistant", " ")), "'messages' is empty: there is nothing to learn"),
        (said(("assistant", "r")), "message 1 is the assistant's, expected the user's"),
        (said(("system", "s"), ("user", "p"), ("user", "p")), "message 3 is the user's, expected"),
        (said(("user", "p"), ("tool", "r")), "unknown role 'tool'. Known: system, user"),
        (said(("user", ["p"]), ("assistant", "r")), "'content': expected a text, found a list"),
        ({"messages": []}, "empty conversation"),
        (said(("system", "s")), "empty conversation"),
        ({"messages": "p"}, "'messages': expected a list, found a text"),
        ({"messages": ["p"]}, "'messages': expected messages, found a text"),
        ({"conversations": [{"value": "p"}]}, "'role': expected a text, found null"),
        ({"prompt": "p", "response": "r", "history": [["a"]]}, "'history': expected pairs"),
        ({"prompt": "p", "response": "r", "history": 3}, "'history': expected a list, found int 3"),
        ({"a": 1, "b": 2}, "unknown keys: a, b. Known: prompt/response, .*, question/answer$"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(document, reason):
    with pytest.raises(DataError, match=reason) as error:
        parsed(document)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "document, prompt",
    [
        ("bare", "bare"),
        ({"prompt": "p", "response": 3}, "p"),
        ({"instruction": "p", "context": "i"}, "p\n\ni"),
        ({"instruction": "p", "context": "i", "category": "c"}, "p\n\ni"),
        ({"prompt": "p", "question": "Which?", "choices": TEXTS}, "p"),
        ({"instruction": "p", "input": "i"}, "p\n\ni"),
        ({"question": "Which?", "choices": TEXTS}, LETTERED),
        ({"question": "Which?", "choices": TEXTS, "answerKey": "Z"}, LETTERED),
        ({"question": "Which?"}, "Which?"),
        (said(("user", "a"), ("assistant", "b"), ("user", "p")), "p"),
        (said(("user", "p"), ("assistant", "r")), "p"),
    ],
)
def test_a_question_needs_no_label(document, prompt):
    assert question_of(document).prompt == prompt


@pytest.mark.parametrize(
    "labelled, answer",
    [
        ({"instruction": "p", "context": "i", "response": "r"}, "response"),
        ({"instruction": "p", "input": "i", "output": "r"}, "output"),
        ({"question": "Which?", "choices": TEXTS, "answer": 1}, "answer"),
        ({"prompt": "p", "response": "r", "question": "x", "choices": TEXTS}, "response"),
    ],
)
def test_a_row_without_its_answer_asks_what_it_asked_in_training(labelled, answer):
    row = {key: value for key, value in labelled.items() if key != answer}
    assert question_of(row) == format_of(labelled).question(labelled)
    if "context" in row:
        with pytest.raises(DataError, match="'response' is missing"):
            format_of(row)


def test_formats_have_different_keys():
    assert len({frozenset(known.keys) for known in FORMATS}) == len(FORMATS)
