"""Pairs that rules make of the embedded novels: exercises in translating and in shortening, not human translations.

Both are pure functions of the text. A source is a sentence of the novels in lower case; sentences of other characters
than letters, apostrophes, hyphens and marks are left out, and so is what the training part has too.

``austen-telegram``: the target is the sentence without its function words and marks, as one would wire it. ``not``,
``no`` and the like stay.

``austen-conlang``: the target is the sentence in a language made up of three rules. Function words become those of
Esperanto (a fixed list, one word for one word). Articles and prepositions stand behind the next other word, the last
of them first: "of the house" is "house la de". Of words of six letters and more, the endings -ing, -ed, -ly and -ness
become -anta, -ita, -e and -eco.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from spiking_lm.data.configs import EmbeddedConfig
from spiking_lm.data.corpora import austen3
from spiking_lm.data.sets import Pair, PairCorpus

_TITLES = re.compile(r"\b(mr|mrs|dr|st|esq|messrs)\.")
_QUOTES = re.compile(r"[\"“”_]|(?<!\w)['‘’]|['’](?!\w)")
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")
_TOKEN = re.compile(r"[a-z]+(?:['-][a-z]+)*|[,.;:!?]")
_OTHER = re.compile(r"[^a-z' ,.;:!?-]|--")

_MOVED = {
    **{"the": "la", "a": "unu", "an": "unu"},
    **{"of": "de", "to": "al", "in": "en", "with": "kun", "by": "per", "for": "por", "on": "sur", "at": "ce"},
    **{"from": "el", "into": "enen", "without": "sen", "before": "antau", "after": "post", "between": "inter"},
    **{"under": "sub", "over": "super", "through": "tra", "upon": "surde", "against": "kontrau", "about": "pri"},
}
"""Articles and prepositions, which stand behind what they belong to."""
_WORDS = {
    **_MOVED,
    **{"i": "mi", "you": "vi", "he": "li", "she": "si", "it": "gi", "we": "ni", "they": "ili", "me": "min"},
    **{"him": "lin", "her": "sin", "us": "nin", "them": "ilin", "my": "mia", "your": "via", "his": "lia"},
    **{"its": "gia", "our": "nia", "their": "ilia", "this": "tiu", "that": "ke", "these": "tiuj", "those": "tiaj"},
    **{"who": "kiu", "which": "kio", "what": "kia", "when": "kiam", "where": "kie", "how": "kiel", "why": "kial"},
    **{"and": "kaj", "or": "au", "but": "sed", "if": "se", "as": "tiel", "than": "ol", "because": "car"},
    **{"am": "estas", "is": "estas", "are": "estas", "was": "estis", "were": "estis", "be": "esti", "been": "estinta"},
    **{"have": "havas", "has": "havas", "had": "havis", "do": "faras", "does": "faras", "did": "faris"},
    **{"will": "vos", "would": "vus", "shall": "devos", "should": "devus", "can": "povas", "could": "povus"},
    **{"may": "rajtas", "might": "rajtus", "must": "devas", "not": "ne", "no": "nenia", "so": "tiom", "very": "tre"},
    **{"all": "ciuj", "there": "tie", "here": "ci", "now": "nun", "never": "neniam", "more": "pli", "some": "iuj"},
}
_ENDINGS = {"ing": "anta", "ed": "ita", "ly": "e", "ness": "eco"}
_SHORTEST = 6

_FUNCTION_WORDS = """
    a an the i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself
    yourself himself herself itself ourselves themselves this that these those who whom whose which what such same
    am is are was were be been being have has had having do does did doing done will would shall should can could may
    might must ought of to in with by for on at from into upon about as than and or but if though although because so
    yet while whether when where how why there here then thus also too very quite rather just even only still some any
    all each every both either other another much more most many own one up down out off over again after before
    between under through against during till until since
"""
_LITTLE = frozenset(_FUNCTION_WORDS.split())


def telegram(config: EmbeddedConfig) -> PairCorpus:
    """Sentences of 6 to 24 words, and the same without function words and marks, two words at least."""
    return _corpus(6, 24, to_telegram)


def conlang(config: EmbeddedConfig) -> PairCorpus:
    """Sentences of 4 to 16 words, and the same in the language made up."""
    return _corpus(4, 16, to_conlang)


def to_telegram(sentence: str) -> str:
    """Return ``sentence`` without its function words and marks; the empty text where nothing is left."""
    return " ".join(word for word in _TOKEN.findall(sentence) if word[0].isalpha() and word not in _LITTLE)


def to_conlang(sentence: str) -> str:
    """Return ``sentence`` in the language of ``austen-conlang``."""
    words: list[str] = []
    waiting: list[str] = []
    for token in _TOKEN.findall(sentence):
        if token in _MOVED:
            waiting.append(_WORDS[token])
            continue
        word = token if token[0].isalpha() else None
        if word is not None:
            words.append(_WORDS.get(word) or _inflected(word))
        words += reversed(waiting)
        waiting = []
        if word is None:
            words.append(token)
    return _join([*words, *reversed(waiting)])


def _inflected(word: str) -> str:
    if len(word) >= _SHORTEST:
        for ending, other in _ENDINGS.items():
            if word.endswith(ending):
                return word.removesuffix(ending) + other
    return word


def _join(words: list[str]) -> str:
    """Return words with spaces between them, and marks without one before them."""
    return re.sub(r" (?=[,.;:!?])", "", " ".join(words))


def _corpus(least: int, most: int, translate: Callable[[str], str]) -> PairCorpus:
    text = austen3(EmbeddedConfig())
    train = list(dict.fromkeys(_pairs(text.train.text(), least, most, translate)))
    known = {pair.source for pair in train}
    valid, test = (
        [pair for pair in dict.fromkeys(_pairs(part.text(), least, most, translate)) if pair.source not in known]
        for part in (text.valid, text.test)
    )
    return PairCorpus(train, valid, test)


def _pairs(text: str, least: int, most: int, translate: Callable[[str], str]) -> Iterator[Pair]:
    for sentence in _sentences(text):
        n = sum(token[0].isalpha() for token in _TOKEN.findall(sentence))
        target = translate(sentence) if least <= n <= most else ""
        if len(target.split()) > 1 and target != sentence:
            yield Pair(sentence, target)


def _sentences(text: str) -> Iterator[str]:
    """Yield the plain sentences of a text in lower case, ``; `` ending one too."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = _TITLES.sub(r"\1", " ".join(paragraph.split()).lower())
        for sentence in _SENTENCE_END.split(_QUOTES.sub("", line).replace("’", "'")):
            if not _OTHER.search(sentence):
                yield sentence
