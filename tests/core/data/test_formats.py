import pytest

from loragen.core.data.formats import AROUND, FORMATS, Answer, Turn, format_of, question_of
from loragen.core.errors import DataError

TEXTS = ["red", "blue", "green"]
LABELLED = {"text": TEXTS, "label": ["A", "B", "C"]}
NUMBERED = {"text": TEXTS, "label": ["1", "2", "3"]}
LETTERED = "Which?\nA: red\nB: blue\nC: green"


def parsed(document):
    known = format_of(document)
    return known.question(document), known.answer(document).response


def said(*pairs, key="messages", role="role", content="content"):
    return {key: [{role: name, content: text} for name, text in pairs]}


EXAMPLES = {
    "prompt/completion (messages)": (
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "r"}],
        },
        "p",
        "r",
    ),
    "prompt/response": ({"prompt": "p", "response": "r", "question": "x", "messages": 3}, "p", "r"),
    "instruction/output[/input]": (
        {"instruction": "p", "input": "i", "output": "r"},
        "p\n\ni",
        "r",
    ),
    "[context/][passage/]question/choices/answerKey": (
        {"question": "Which?", "choices": LABELLED, "answerKey": "B"},
        LETTERED,
        "[B]",
    ),
    "messages": (said(("user", "p"), ("assistant", "r")), "p", "r"),
    "conversations": (
        said(("human", "p"), ("gpt", "r"), key="conversations", role="from", content="value"),
        "p",
        "r",
    ),
    "prompt/completion": ({"prompt": "p", "completion": "r"}, "p", "r"),
    "query/response": ({"query": "p", "response": "r"}, "p", "r"),
    "instruction/response[/context]": (
        {"instruction": "p", "context": "i", "response": "r"},
        "p\n\ni",
        "r",
    ),
    "question_stem/choices/answerKey": (
        {"question_stem": "Which?", "choices": LABELLED, "answerKey": "C"},
        LETTERED,
        "[C]",
    ),
    "[context/][passage/]question/choices/answer": (
        {"question": "Which?", "choices": TEXTS, "answer": 0},
        LETTERED,
        "[A]",
    ),
    "[context/][passage/]question/answer": ({"question": "p", "answer": "r"}, "p", "r"),
    "[Definition/]input/output": (
        {"Definition": "d", "input": "p", "output": ["r", "s"], "id": "task1-1"},
        "d\n\np",
        "r",
    ),
    "[task_prefix/]input/target_scores": (
        {"input": "Which?", "target_scores": {"red": 0, "blue": 1, "green": 0.5}},
        LETTERED,
        "[B]",
    ),
    "[task_prefix/]input/target": (
        {"task_prefix": "d", "input": "p", "target": "r"},
        "d\n\np",
        "r",
    ),
    "input/targets": ({"input": "p", "targets": ["r"]}, "p", "r"),
    "inputs_pretokenized/targets_pretokenized": (
        {
            "inputs": [3, 1], "targets": [2, 1],
            "inputs_pretokenized": "p", "targets_pretokenized": "r",
        },
        "p",
        "r",
    ),
    "[definition/]inputs/targets": ({"inputs": "p", "targets": "r"}, "p", "r"),
}  # fmt: skip


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_every_format_is_read(known):
    document, prompt, answer = EXAMPLES[known.name]
    assert format_of(document) is known
    question, given = parsed(document)
    assert (question.prompt, given) == (prompt, answer)
    assert (question.system, question.history) == (None, ())


@pytest.mark.parametrize(
    "document, prompt",
    [
        ({"instruction": "p", "output": "r"}, "p"),
        ({"instruction": "p", "input": "", "output": "r"}, "p"),
        ({"instruction": "p", "input": None, "output": "r"}, "p"),
        ({"input": "p", "output": "r"}, "p"),
        ({"definition": "d", "inputs": "p", "targets": "r"}, "d\n\np"),
        ({"question": "p", "answer": "r", "passage": "d"}, "d\n\np"),
        ({"context": "d", "question": "p", "answer": "r"}, "d\n\np"),
        ({"context": "", "question": "p", "answer": "r", "passage": None}, "p"),
    ],
)
def test_a_row_may_lack_the_texts_around_its_prompt(document, prompt):
    assert parsed(document)[0].prompt == prompt
    assert parsed(document)[1] == "r"


@pytest.mark.parametrize(
    "given, answer",
    [
        ("r", Answer("r")),
        (["r", "s", "r", "t"], Answer("r", ("s", "t"))),
        (3, Answer("3", as_json=True)),
        (-1.5, Answer("-1.5", as_json=True)),
        (True, Answer("true", as_json=True)),
        (["yes", 1], Answer("yes", ("1",), as_json=True)),
    ],
)
@pytest.mark.parametrize(
    "prompt, key", [("input", "output"), ("question", "answer"), ("input", "target")]
)
def test_an_answer_may_be_several_or_a_number(prompt, key, given, answer):
    document = {prompt: "p", key: given}
    assert format_of(document).answer(document) == answer


@pytest.mark.parametrize(
    "given, reason",
    [
        ([], "'output' is empty"),
        (["r", " "], "'output' is empty"),
        (None, "'output': expected a text, found null"),
        (float("nan"), "'output': expected a text, found float nan"),
        ({"a": 1}, "'output': expected a text, found an object"),
        ([["r"]], "'output': expected a text, found a list"),
    ],
)
def test_an_answer_that_is_none_is_refused(given, reason):
    with pytest.raises(DataError, match=reason):
        parsed({"input": "p", "output": given})


def test_all_choices_with_the_highest_score_are_right():
    document = {"input": "Which?", "target_scores": {"red": 1, "blue": 0, "green": 1.0, "x": None}}
    assert format_of(document).answer(document) == Answer("[A]", ("[C]",))
    assert format_of(document).question(document).choices == ["[A]", "[B]", "[C]"]


def test_a_conversation_may_be_in_two_parts():
    prompt = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "p"), key="prompt")
    document = prompt | said(("assistant", "r"), key="completion")
    question, answer = parsed(document)
    assert (question.prompt, question.system, answer) == ("p", "s", "r")
    assert question.history == (Turn("a", "b"),)
    assert question_of(prompt) == question


def test_a_developer_is_the_system():
    assert parsed(said(("developer", "s"), ("user", "p"), ("assistant", "r")))[0].system == "s"


def test_the_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b", "image": None}]
    question, answer = parsed(said(("user", parts), ("assistant", [{"type": "text", "text": "r"}])))
    assert (question.prompt, answer) == ("a\nb", "r")


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_a_part_that_is_no_text_is_refused_by_its_name(kind):
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    with pytest.raises(DataError, match=f"message 1 has a bad 'content': a part of the .*'{kind}'"):
        parsed(said(("user", parts), ("assistant", "r")))


def test_texts_around_the_rows_are_those_of_the_formats():
    known = ("system", "context", "passage", "Definition", "task_prefix", "definition")
    assert known == AROUND


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
        *((choices, "blue") for choices in (LABELLED, NUMBERED, TEXTS)),
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
        (
            {"question": "q", "choices": ["B", "A"], "answerKey": "A"},
            "'A' is the label or the text of several: A, B",
        ),
        (
            {"question": "q", "choices": ["3", "2"], "answerKey": "2"},
            "'answerKey': '2' may count from 0",
        ),
        ({"input": "q", "target_scores": {"a": 1}}, "expected scores of 2 to 26 texts, found 1"),
        ({"input": "q", "target_scores": {"a": 1, "b": "x"}}, "expected a number for 'b'"),
        ({"input": "q", "target_scores": ["a"]}, "'target_scores': expected an object"),
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
        (said(("user", "p"), ("robot", "r")), "message 2 has the unknown role 'robot'. Known: sys"),
        (said(("user", "p"), ("tool", "r")), "message 2 is a tool's, which cannot be learned"),
        (
            {
                "messages": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "tool_calls": [1]},
                ]
            },
            "message 2 calls a tool",
        ),
        (
            said(("user", "p"), ("function_call", "{}"), role="from", content="value"),
            "message 2 calls a tool",
        ),
        (
            said(("user", ["p"]), ("assistant", "r")),
            "message 1 has .* parts with a type, found a t",
        ),
        (said(("user", 3), ("assistant", "r")), "message 1 has a bad 'content': expected a text"),
        ({"messages": []}, "empty conversation"),
        (said(("system", "s")), "empty conversation"),
        ({"messages": "p"}, "'messages': expected a list, found a text"),
        ({"messages": ["p"]}, "'messages': message 1 is a text, no message"),
        ({"conversations": [{"value": "p"}]}, "message 1 has the unknown role null"),
        (
            {"messages": [{"role": ["user"], "content": "p"}]},
            "message 1 has the unknown role a lis",
        ),
        ({"input": "p", "target_scores": {"a": float("nan"), "b": 1}}, "'a', found float nan"),
        ({"prompt": "p", "response": "r", "history": [["a"]]}, "'history': expected pairs"),
        ({"prompt": "p", "response": "r", "history": 3}, "'history': expected a list, found int 3"),
        (
            {"a": 1, "b": 2},
            "unknown keys: a, b. Known: prompt/.*question/answer, .*inputs/targets$",
        ),
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


def test_formats_have_different_names():
    assert len({known.name for known in FORMATS}) == len(FORMATS)
