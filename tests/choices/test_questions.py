"""Every published layout is read as its authors and as lm-eval mean it, and what is wrong with a file is said."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from choice_toys import TASKS, make_lines, write_lines

from spiking_lm.data.questions import LAYOUTS, Question, read_questions
from spiking_lm.errors import DataError

PIQA = {"goal": "How do I ready a guinea pig cage?", "sol1": "Use bedding of paper.", "sol2": "Use bedding of jeans."}
ARC_CHOICES = {"text": ["dry palms", "wet palms", "cold palms"], "label": ["A", "B", "C"]}
BOOLQ = {"question": "is it warm", "passage": "Warmth -- It is."}
SWAG = {
    "ind": 4,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap.", "is [substeps] ripping tiles.", " holds a cube.", "starts [title] Pull up."],
}
WINO = {"sentence": "Ann asked Eve as _ was lost.", "option1": "Ann", "option2": "Eve"}

EXPECTED = {
    "piqa": Question(
        ("Question: How do I ready a guinea pig cage?\nAnswer:",) * 2,
        ("Use bedding of paper.", "Use bedding of jeans."),
        1,
    ),
    "arc": Question(("Question: Which is wet?\nAnswer:",) * 3, ("dry palms", "wet palms", "cold palms"), 1),
    "boolq": Question(("Warmth -- It is.\nQuestion: is it warm?\nAnswer:",) * 2, ("no", "yes"), 1),
    "hellaswag": Question(
        ("Roof shingle removal: A man is sitting on a roof. He",) * 4,
        ("is using wrap.", "is ripping tiles.", "holds a cube.", "starts. Pull up."),
        3,
    ),
    "winogrande": Question(("Ann asked Eve as Ann", "Ann asked Eve as Eve"), ("was lost.", "was lost."), 1),
}

ARC_AUTHORS = [{"text": text, "label": label} for text, label in zip(*ARC_CHOICES.values(), strict=True)]
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("piqa", {**PIQA, "label": 1}),
    ("piqa", {**PIQA, "label": "1"}),
    ("arc", {"id": "x", "question": "Which is wet?", "choices": ARC_CHOICES, "answerKey": "B"}),
    ("arc", {"id": "x", "question": {"stem": "Which is wet?", "choices": ARC_AUTHORS}, "answerKey": "B"}),
    ("boolq", {**BOOLQ, "answer": True, "title": "Warmth"}),
    ("boolq", {**BOOLQ, "label": True, "idx": 0}),
    ("boolq", {**BOOLQ, "label": 1, "idx": 0}),
    ("hellaswag", {**SWAG, "label": "3", "source_id": "activitynet~v"}),
    ("hellaswag", {**SWAG, "label": 3, "split": "val", "split_type": "indomain"}),
    ("winogrande", {**WINO, "answer": "2", "qID": "3"}),
    ("winogrande", {**WINO, "answer": 2}),
]


@pytest.mark.parametrize(("task", "line"), PUBLISHED)
def test_every_published_layout_asks_the_same(task: str, line: dict[str, Any], tmp_path: Path) -> None:
    file = read_questions(write_lines(tmp_path / "some.jsonl", [line, line]))
    assert (file.task, file.questions) == (task, [EXPECTED[task]] * 2)
    assert file.normalised == (task in ("piqa", "arc", "hellaswag"))


def test_the_labels_of_piqa_may_lie_beside_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "valid.jsonl", [PIQA, PIQA, PIQA])
    with pytest.raises(DataError, match=r"field 'label' is missing, and there is no valid-labels.lst beside it"):
        read_questions(path)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n1\n")
    assert [question.answer for question in read_questions(path).questions] == [1, 0, 1]
    assert [question.answer for question in read_questions(path, limit=2).questions] == [1, 0]
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(DataError, match=r"valid-labels.lst has 2 labels, but .*valid.jsonl has 3 questions"):
        read_questions(path)


@pytest.mark.parametrize("task", TASKS)
def test_files_may_be_compressed_have_empty_lines_and_be_read_in_part(task: str, tmp_path: Path) -> None:
    lines = make_lines(task, 7)
    plain = read_questions(write_lines(tmp_path / "plain.jsonl", lines))
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    (tmp_path / "other.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    assert read_questions(tmp_path / "other.jsonl.xz").questions == plain.questions
    assert read_questions(tmp_path / "plain.jsonl", limit=3).questions == plain.questions[:3]
    assert len(plain.questions) == 7


def test_layouts_cannot_be_taken_for_each_other() -> None:
    for task, layout in LAYOUTS.items():
        for other, more in LAYOUTS.items():
            assert task == other or not layout.fields <= more.fields


def test_the_first_blank_is_the_one_to_fill_and_brackets_go(tmp_path: Path) -> None:
    line = {**WINO, "sentence": "_ gave Eve the snake_case.", "answer": "1"}
    question = read_questions(write_lines(tmp_path / "w.jsonl", [line])).questions[0]
    assert question == Question(("Ann", "Eve"), ("gave Eve the snake_case.",) * 2, 0)
    line = {**SWAG, "ctx_a": "[header] How to [title] Sit", "ctx_b": "", "endings": ["[x]", "b"], "label": 0}
    question = read_questions(write_lines(tmp_path / "h.jsonl", [line])).questions[0]
    assert question == Question(("Roof shingle removal: How to. Sit",) * 2, ("", "b"), 0)


BROKEN: list[tuple[str, Any, str]] = [
    ("piqa", '{"goal": "x"', r"line 2 is not JSON"),
    ("piqa", "[1, 2]", r"line 2 is \[1, 2\], not a JSON object"),
    ("piqa", {"goal": "x", "sol1": "y", "label": 1}, r"line 2: field 'sol2' is missing"),
    ("piqa", {**PIQA, "sol1": 5, "label": 1}, r"line 2: field 'sol1' is 5, not a text"),
    ("piqa", {**PIQA, "sol1": " ", "label": 1}, r"line 2: field 'sol1' is empty"),
    ("piqa", {**PIQA, "label": 2}, r"line 2: field 'label' is 2, not a number from 0 to 1"),
    ("piqa", {**PIQA, "label": 0.5}, r"line 2: field 'label' is 0.5, not a number from 0 to 1"),
    ("piqa", {**PIQA, "label": None}, r"line 2: field 'label' is null, not a number from 0 to 1"),
    ("piqa", {**PIQA, "label": -1}, r"line 2: field 'label' is -1: the answer is held back"),
    ("piqa", {**PIQA}, r"line 2: field 'label' is missing"),
    (
        "arc",
        {"question": "q", "choices": ARC_CHOICES, "answerKey": "D"},
        r"line 2: field 'answerKey' is 'D', which is none of \['A', 'B', 'C'\]",
    ),
    ("arc", {"question": "q", "choices": ARC_CHOICES}, r"line 2: field 'answerKey' is missing"),
    ("arc", {"question": "q", "choices": "A", "answerKey": "A"}, r"line 2: field 'choices' is \"A\", not an object"),
    (
        "arc",
        {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
        r"line 2, in 'choices': field 'text' needs at least two choices",
    ),
    (
        "arc",
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "A"},
        r"line 2, in 'choices': field 'label' has 3 labels for 2 texts",
    ),
    (
        "arc",
        {"question": {"stem": "q", "choices": [{"text": "a", "label": "A"}, {"text": "b"}]}, "answerKey": "A"},
        r"line 2, in 'question', in 'choices': field 'label' is \[\"A\", null\], not a list of texts",
    ),
    (
        "arc",
        {"question": {"stem": "q", "choices": ["a"]}, "answerKey": "A"},
        r"line 2, in 'question': field 'choices' is \[\"a\"\], not a list of objects",
    ),
    ("boolq", {**BOOLQ}, r"line 2: field 'answer' is missing"),
    ("boolq", {**BOOLQ, "answer": "maybe"}, r"line 2: field 'answer' is \"maybe\", not a number from 0 to 1"),
    ("hellaswag", {**SWAG, "label": ""}, r"line 2: field 'label' is '': the answer is held back"),
    ("hellaswag", {**SWAG, "label": "4"}, r"line 2: field 'label' is \"4\", not a number from 0 to 3"),
    (
        "hellaswag",
        {**SWAG, "endings": ["a", 4], "label": 0},
        r"line 2: field 'endings' is \[\"a\", 4\], not a list of texts",
    ),
    ("winogrande", {**WINO, "sentence": "No blank.", "answer": "1"}, r"line 2: field 'sentence' needs a blank"),
    ("winogrande", {**WINO, "sentence": "It is _ ", "answer": "1"}, r"line 2: field 'sentence' needs a blank"),
    ("winogrande", {**WINO, "answer": ""}, r"line 2: field 'answer' is '': the answer is held back"),
    ("winogrande", {**WINO, "answer": "0"}, r"line 2: field 'answer' is \"0\", not a number from 1 to 2"),
]


@pytest.mark.parametrize(("task", "line", "message"), BROKEN)
def test_what_is_wrong_is_said_with_file_line_and_field(task: str, line: Any, message: str, tmp_path: Path) -> None:
    good = next(example for name, example in PUBLISHED if name == task)
    path = tmp_path / f"{task}.jsonl"
    path.write_text(json.dumps(good) + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(DataError, match=rf"{task}.jsonl, {message}"):
        read_questions(path)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(DataError, match=r"cannot (open|read) .*nowhere"):
        read_questions(Path("nowhere.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no questions"),
        ("\n \n", "has no questions"),
        ('{"prompt": "x"}\n', r"a line with the fields prompt is none of the known layouts"),
        ("{}\n", r"a line with the fields none is none of the known layouts"),
    ],
)
def test_a_file_of_something_else_is_said(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        read_questions(tmp_path / "x.jsonl")
    if "layouts" in message:
        assert "winogrande: option1, option2, sentence" in str(raised.value.hint)
