"""WordNet as text: a plain dictionary, and short conversations about the commonest words.

A synset goes into one of the two, never into both. The conversations give the model the shape of a chat: a question
about a word, an answer, perhaps a follow-up. They are built from templates, chosen by a generator that is seeded with
the word, so the same data always give the same text.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smalltalk import CLOSINGS, OPENINGS, SYSTEM

WORDNET_DATA = "usr/share/wordnet"
_PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_SENSE_TYPE = {"n": 1, "v": 2, "a": 3, "r": 4, "s": 5}
_SPOKEN = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
ENTRIES_PER_DOCUMENT = 40
MINIMUM_COUNT = 2  # words that WordNet's tagged texts use less often are in the dictionary only
FREQUENT, FREQUENT_VARIANTS = 1500, 3  # the commonest words are asked about in several ways

Message = tuple[str, str]  # role, content


class Synset(NamedTuple):
    """One meaning and its words. `word` is the one whose main sense this is and that people use most ("" if none),
    `uses` how often WordNet's tagged texts use it so."""

    part: str
    lexicographer_file: int
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    word: str
    uses: int


# ---------------------------------------------------------------- reading (formats: wndb(5WN), cntlist(5WN))


def _sense_counts(root: Path) -> dict[str, int]:
    """Sense key without the head word of satellites → how often it was tagged."""
    counts = {}
    for line in (root / WORDNET_DATA / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        counts[":".join(key.split(":")[:3])] = int(count)
    return counts


def _main_senses(path: Path) -> dict[str, str]:
    """Lower-case lemma → offset of its most frequent synset."""
    senses = {}
    for line in path.read_text().splitlines():
        if not line.startswith(" "):
            fields = line.split()
            senses[fields[0]] = fields[-int(fields[2])]
    return senses


def _split_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    definition = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0].strip(" ;")
    examples = (text.strip(" ;,") for text in re.findall(r'"([^"]+)"', gloss))
    return definition, tuple(text for text in examples if len(text.split()) > 2)


def synsets(root: Path) -> Iterator[Synset]:
    """Every synset, nouns first, in the order of the files."""
    counts = _sense_counts(root)
    for part in _PARTS.values():
        main = _main_senses(root / WORDNET_DATA / f"index.{part}")
        for line in (root / WORDNET_DATA / f"data.{part}").read_text().splitlines():
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition(" | ")
            offset, lexicographer_file, kind, size, *fields = head.split()
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[: 2 * int(size, 16) : 2]]
            best, word = 0, ""
            for lemma, lex_id in zip(words, fields[1::2], strict=False):
                key = f"{lemma.lower()}%{_SENSE_TYPE[kind]}:{lexicographer_file}:{int(lex_id, 16):02d}"
                if main.get(lemma.lower()) == offset and lemma.islower() and counts.get(key, 0) > best:
                    best, word = counts[key], lemma.replace("_", " ")
            lemmas = tuple(word.replace("_", " ") for word in words)
            yield Synset(part, int(lexicographer_file), lemmas, *_split_gloss(gloss.strip()), word, best)


# ---------------------------------------------------------------- the dictionary


def _entry(synset: Synset) -> str:
    examples = "".join(f' "{example}"' for example in synset.examples)
    return f"{', '.join(synset.lemmas)} ({_SPOKEN[synset.part]}): {synset.definition}.{examples}"


def dictionary(entries: list[Synset]) -> Iterator[tuple[str, str]]:
    """Pages of neighbouring entries (WordNet sorts by field of meaning). Names of persons, places and species are left
    out: a synset counts as a name when each of its words has a capital letter."""
    pages: dict[tuple[str, int], list[str]] = {}
    for synset in entries:
        if any(lemma.islower() for lemma in synset.lemmas):
            pages.setdefault((synset.part, synset.lexicographer_file), []).append(_entry(synset))
    for (part, number), lines in pages.items():
        for start in range(0, len(lines), ENTRIES_PER_DOCUMENT):
            yield f"{part}.{number:02d}.{start}", "\n\n".join(lines[start : start + ENTRIES_PER_DOCUMENT]) + "\n"


# ---------------------------------------------------------------- the conversations

_QUESTIONS = {
    "noun": ("What is {thing}?", "What is {thing}?", "What's {thing}?", "What does {word} mean?", "Define {word}.",
             "Tell me what {thing} is."),
    "verb": ("What does {word} mean?", "What does it mean to {word}?", "Define {word}."),
    "adj": ("What does {word} mean?", "What does {word} mean?", "Define {word}.", "What is the meaning of {word}?"),
    "adv": ("What does {word} mean?", "Define {word}.", "What is the meaning of {word}?"),
}  # fmt: skip
_ANSWERS = {"noun": "{Thing} is {meaning}.", "verb": "To {word} means to {meaning}."}
_EXAMPLE_REQUESTS = ("Use it in a sentence.", "Can you use it in a sentence?", "Give me an example.", "For example?")
_EXAMPLE_QUESTIONS = ("Use {word} in a sentence.", "Give me a sentence with the word {word}.")
_OTHER_WORDS = ("What is another word for {word}?", "Give me a synonym of {word}.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return _capital(text) + ("" if text.endswith((".", "!", "?")) else ".")


def _meaning(definition: str) -> str:
    """The definition's first part, without remarks in leading parentheses ("(botany) a living organism …")."""
    text = re.sub(r"^(\([^)]*\),?\s*)+", "", definition)
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ";" and depth == 0:
            text = text[:at]
            break
    return re.sub(r"\s*(e\.g\.|i\.e\.|etc\.)?$", "", text) or definition


def _thing(word: str, meaning: str) -> str:
    """The noun with an article when its definition begins with one: a dog, an apple, water."""
    if re.match(r"(an?|any|one|someone|something) ", meaning) and not word.endswith("s"):
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    return word


def _about(synset: Synset, choice: random.Random) -> Iterator[Message]:
    """Questions and answers about one word."""
    word, meaning = synset.word, _meaning(synset.definition)
    if synset.part == "verb":
        meaning = meaning.removeprefix("to ")
    thing = _thing(word, meaning)
    names = {"word": word, "thing": thing, "Thing": _capital(thing), "meaning": meaning}
    stem = word[: max(3, len(word) - 2)]  # an example may show a synonym only, or an inflected form
    examples = [text for text in synset.examples if stem in text.lower()]
    others = [lemma for lemma in synset.lemmas if lemma != word and lemma.islower()]
    if examples and choice.random() < 0.15:
        yield "user", choice.choice(_EXAMPLE_QUESTIONS).format(**names)
        yield "assistant", _sentence(choice.choice(examples))
        return
    if others and choice.random() < 0.1:
        yield "user", choice.choice(_OTHER_WORDS).format(**names)
        yield "assistant", f"Another word for {word} is {others[0]}."
        return
    yield "user", choice.choice(_QUESTIONS[synset.part]).format(**names)
    yield "assistant", _ANSWERS.get(synset.part, '"{word}" means {meaning}.').format(**names)
    if examples and choice.random() < 0.4:
        yield "user", choice.choice(_EXAMPLE_REQUESTS)
        yield "assistant", _sentence(choice.choice(examples))


def _small_talk(pairs: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...], choice: random.Random) -> Iterator[Message]:
    questions, answers = choice.choice(pairs)
    yield "user", choice.choice(questions)
    yield "assistant", choice.choice(answers)


def conversations(entries: list[Synset]) -> Iterator[tuple[str, list[Message]]]:
    """(title, messages). Titles of one word's conversations differ only behind " #"."""
    ranked = sorted(entries, key=lambda synset: (-synset.uses, synset.word, synset.part))
    for rank, synset in enumerate(ranked):
        for variant in range(FREQUENT_VARIANTS if rank < FREQUENT else 1):
            choice = random.Random(f"{synset.word} {synset.part} {variant}")
            messages: list[Message] = []
            if choice.random() < 0.1:
                messages.append(("system", choice.choice(SYSTEM)))
            if choice.random() < 0.25:
                messages.extend(_small_talk(OPENINGS, choice))
            messages.extend(_about(synset, choice))
            if choice.random() < 0.1:
                messages.extend(_small_talk(CLOSINGS, choice))
            yield f"{synset.word} ({_SPOKEN[synset.part]}) #{variant}", messages


def split_synsets(root: Path) -> tuple[list[Synset], list[Synset]]:
    """(for the conversations, for the dictionary). A word is talked about as the part of speech it mostly is."""
    everything = list(synsets(root))
    best: dict[str, Synset] = {}
    for synset in everything:
        rival = best.get(synset.word)
        if synset.uses >= MINIMUM_COUNT and (rival is None or synset.uses > rival.uses):
            best[synset.word] = synset
    talked = {id(synset) for synset in best.values()}
    return list(best.values()), [synset for synset in everything if id(synset) not in talked]
