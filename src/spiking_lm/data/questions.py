"""Multiple-choice questions, one JSON object a line, as PIQA, ARC, BoolQ, HellaSwag and Winogrande are published.

A file's layout is recognised by the fields of its first line. Each is read as its authors publish it and as the
Hugging Face datasets export it. The prompts are those of lm-eval (0.4): what follows a prompt is a space and a choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_lm.data.sources import TextSource, find_optional, text_start
from spiking_lm.errors import DataError


@dataclass(frozen=True)
class Question:
    """What is asked: the text before each choice, the choices, and which of them is right.

    What comes before is the same for every choice, but for Winogrande: there the choices are filled into the sentence,
    and what is scored is the rest of it, which is the same.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one file, and what must be known to compare their score with another's."""

    task: str
    path: Path
    sha256: str
    prompt: str
    """How a question is put, in words."""
    normalised: bool
    """Whether acc_norm is meaningful: the choices differ in length."""
    questions: list[Question]


class _Line:
    """One line of a file; what is wrong with it is said with file, line and field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def wrong(self, field: str, what: str, hint: str | None = None) -> DataError:
        return DataError(f"{self._where}: field {field!r} {what}", hint=hint)

    def has(self, field: str) -> bool:
        return field in self._values

    def get(self, field: str) -> Any:
        if field not in self._values:
            raise self.wrong(field, "is missing")
        return self._values[field]

    def text(self, field: str, *, empty: bool = False) -> str:
        value = self.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, f"is {_shown(value)}, not a text")
        if not (empty or value.strip()):
            raise self.wrong(field, "is empty")
        return value

    def texts(self, field: str) -> list[str]:
        values = self.get(field)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.wrong(field, f"is {_shown(values)}, not a list of texts")
        if len(values) < 2 or not all(value.strip() for value in values):
            raise self.wrong(field, "needs at least two choices, none of them empty")
        return values

    def inner(self, field: str) -> _Line:
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.wrong(field, f"is {_shown(value)}, not an object")
        return _Line(value, f"{self._where}, in {field!r}")

    def number(self, field: str, first: int, count: int) -> int:
        """Return which of ``count`` choices is named by a number, written as one or as a text, from ``first`` on."""
        value = self.get(field)
        if value in ("", -1, "-1"):
            raise self.wrong(field, f"is {value!r}: the answer is held back", hint=_NO_ANSWERS)
        try:
            index = int(value) - first
        except (TypeError, ValueError):
            index = -1
        if not 0 <= index < count or isinstance(value, float):
            raise self.wrong(field, f"is {_shown(value)}, not a number from {first} to {first + count - 1}")
        return index


_NO_ANSWERS = "published test files have no answers: take the validation file"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _piqa(line: _Line) -> Question:
    prompt = f"Question: {line.text('goal', empty=True)}\nAnswer:"
    return Question((prompt,) * 2, (line.text("sol1"), line.text("sol2")), line.number("label", 0, 2))


def _arc(line: _Line) -> Question:
    if isinstance(line.get("question"), dict):  # as AI2 publishes it
        inner = line.inner("question")
        stem, listed = inner.text("stem"), inner.get("choices")
        if not isinstance(listed, list) or not all(isinstance(choice, dict) for choice in listed):
            raise inner.wrong("choices", f"is {_shown(listed)}, not a list of objects with 'text' and 'label'")
        columns = {name: [choice.get(name) for choice in listed] for name in ("text", "label")}
        choices = _Line(columns, f"{inner._where}, in 'choices'")
    else:
        stem, choices = line.text("question"), line.inner("choices")
    texts, labels = choices.texts("text"), choices.texts("label")
    if len(texts) != len(labels):
        raise choices.wrong("label", f"has {len(labels)} labels for {len(texts)} texts")
    key = line.text("answerKey", empty=True)
    if key not in labels:
        raise line.wrong("answerKey", f"is {key!r}, which is none of {labels}", hint=None if key else _NO_ANSWERS)
    return Question((f"Question: {stem}\nAnswer:",) * len(texts), tuple(texts), labels.index(key))


def _boolq(line: _Line) -> Question:
    prompt = f"{line.text('passage')}\nQuestion: {line.text('question')}?\nAnswer:"
    field = "answer" if line.has("answer") else "label"  # the authors', and SuperGLUE's
    if not line.has(field):
        raise line.wrong("answer", "is missing", hint=_NO_ANSWERS)
    value = line.get(field)
    answer = int(value) if isinstance(value, bool) else line.number(field, 0, 2)
    return Question((prompt,) * 2, ("no", "yes"), answer)


def _hellaswag(line: _Line) -> Question:
    scene = f"{line.text('ctx_a', empty=True)} {line.text('ctx_b', empty=True).capitalize()}"
    prompt = _without_marks(f"{line.text('activity_label')}: {scene}")
    endings = [_without_marks(ending) for ending in line.texts("endings")]
    return Question((prompt,) * len(endings), tuple(endings), line.number("label", 0, len(endings)))


def _without_marks(text: str) -> str:
    """Take out what the WikiHow part of HellaSwag has in brackets; ``[title]`` becomes the end of a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(line: _Line) -> Question:
    before, blank, after = line.text("sentence").partition("_")
    if not blank or not after.strip():
        raise line.wrong("sentence", "needs a blank, written _, and words after it")
    filled = tuple(before + line.text(option) for option in ("option1", "option2"))
    return Question(filled, (after.strip(),) * 2, line.number("answer", 1, 2))


@dataclass(frozen=True)
class _Layout:
    fields: frozenset[str]
    """Those that every line has, whoever exported it, and no other layout has all of."""
    read: Callable[[_Line], Question]
    prompt: str
    normalised: bool


LAYOUTS: dict[str, _Layout] = {
    "piqa": _Layout(frozenset({"goal", "sol1", "sol2"}), _piqa, "Question: GOAL\\nAnswer:", True),
    "arc": _Layout(frozenset({"question", "answerKey"}), _arc, "Question: QUESTION\\nAnswer:", True),
    "boolq": _Layout(
        frozenset({"passage", "question"}), _boolq, "PASSAGE\\nQuestion: QUESTION?\\nAnswer:, then no or yes", False
    ),
    "hellaswag": _Layout(
        frozenset({"activity_label", "ctx_a", "ctx_b", "endings"}),
        _hellaswag,
        "ACTIVITY: CTX_A CTX_B, the latter capitalised, what is in brackets taken out",
        True,
    ),
    "winogrande": _Layout(
        frozenset({"sentence", "option1", "option2"}),
        _winogrande,
        "the sentence up to the blank, with an option in it; the rest of the sentence is scored",
        False,
    ),
}


def read_questions(path: Path, limit: int | None = None) -> QuestionFile:
    """Read a file of questions, .jsonl, plain or compressed, or only the first ``limit`` of them.

    PIQA's authors keep the labels apart, one a line: for ``valid.jsonl`` they are read from ``valid-labels.lst``.

    Raises: DataError naming the file, the line and the field.
    """
    path = path.expanduser()
    source = TextSource.of_file(path, text_start(path))
    numbered = [(number, text) for number, text in enumerate(source.text().split("\n"), 1) if text.strip()]
    if not numbered:
        raise DataError(f"{path} has no questions")
    lines = [_parse(text, f"{path}, line {number}") for number, text in numbered[:limit]]
    task = _recognise(lines[0], path)
    layout = LAYOUTS[task]
    if task == "piqa" and "label" not in lines[0]:
        lines = _with_labels(path, lines, len(numbered))
    questions = [
        layout.read(_Line(values, f"{path}, line {number}"))
        for values, (number, _) in zip(lines, numbered, strict=False)  # up to the limit
    ]
    return QuestionFile(task, path, source.sha256, layout.prompt, layout.normalised, questions)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error})", hint="one JSON object a line is expected") from None
    if not isinstance(values, dict):
        raise DataError(f"{where} is {_shown(values)}, not a JSON object")
    return values


def _recognise(values: dict[str, Any], path: Path) -> str:
    for task, layout in LAYOUTS.items():
        if layout.fields <= values.keys():
            return task
    known = "; ".join(f"{task}: {', '.join(sorted(layout.fields))}" for task, layout in LAYOUTS.items())
    raise DataError(
        f"{path}: a line with the fields {', '.join(sorted(values)) or 'none'} is none of the known layouts",
        hint=f"they are recognised by these fields: {known}",
    )


def _with_labels(path: Path, lines: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    labels_path = find_optional([path.with_name(f"{path.name.partition('.')[0]}-labels.lst")])
    if labels_path is None:
        raise DataError(
            f"{path}: field 'label' is missing, and there is no {path.name.partition('.')[0]}-labels.lst beside it",
            hint=_NO_ANSWERS,
        )
    labels = TextSource.of_file(labels_path).text().split()
    if len(labels) != n:
        raise DataError(f"{labels_path} has {len(labels)} labels, but {path} has {n} questions")
    return [{**values, "label": label} for values, label in zip(lines, labels, strict=False)]
