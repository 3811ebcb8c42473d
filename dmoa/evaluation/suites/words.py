"""Lists of common words to sort, pick from, compare and count; the suite `words`, and parts of `chain`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from math import factorial, perm
from typing import Literal

from dmoa.evaluation.suites.suite import NUMBER_FORMAT, Kind, Latent, Level, Problem, Suite, Templates

Asked = Literal["sort", "pick", "longest", "letters", "count"]

_LETTERS = "aeilnorst"
"""Letters that `count` asks about: the commonest ones."""

_WORD_FORMAT = "End with a line `Answer: ...`, one word."
_FORMATS: dict[Asked, str] = {
    "sort": "End with a line `Answer: ...`, the words with commas between them.",
    "pick": _WORD_FORMAT,
    "longest": _WORD_FORMAT,
    "letters": NUMBER_FORMAT,
    "count": NUMBER_FORMAT,
}

TEMPLATES: dict[Asked, Templates] = {
    "sort": Templates(
        name="sort",
        open=(
            "Sort these words alphabetically: {words}.",
            "Put these words in alphabetical order: {words}.",
            "Arrange the following words from A to Z: {words}.",
            "Write these words in the order of a dictionary: {words}.",
        ),
        validation=("Order this list alphabetically: {words}.", "List these words from A to Z: {words}."),
        test=("Bring these words into alphabetical order: {words}.", "Alphabetise the following words: {words}."),
    ),
    "pick": Templates(
        name="pick",
        open=(
            "Which word is number {n} in this list: {words}?",
            "What is word number {n} of these words: {words}?",
            "Counting from 1, name word {n} of: {words}.",
            "Give word {n} of the following list: {words}.",
        ),
        validation=("Read this list and name its word number {n}: {words}.", "Say which word stands at place {n}: {words}."),
        test=("Find word number {n} in the following list: {words}.", "Which of these words is at position {n}: {words}?"),
    ),
    "longest": Templates(
        name="longest",
        open=(
            "Which of these words is the longest: {words}?",
            "Name the word with the most letters: {words}.",
            "Find the longest word in this list: {words}.",
            "What is the longest of these words: {words}?",
        ),
        validation=("Say which word of this list is longest: {words}.", "Pick the word that has the most letters: {words}."),
        test=("Which word in the following list is the longest: {words}?", "Give the longest of the words: {words}."),
    ),
    "letters": Templates(
        name="letters",
        open=(
            "How many letters do these words have together: {words}?",
            "Count all letters in these words: {words}.",
            "What is the total number of letters in: {words}?",
            "Add up the letters of these words: {words}.",
        ),
        validation=("How many letters are there in this list: {words}?", "Give the number of letters in these words: {words}."),
        test=("Count the letters of the following words: {words}.", "How many letters long is this list in all: {words}?"),
    ),
    "count": Templates(
        name="count",
        open=(
            "How many of these words contain the letter '{letter}': {words}?",
            "Count the words with the letter '{letter}' in this list: {words}.",
            "In how many of these words is there a letter '{letter}': {words}?",
            "What is the number of words that have the letter '{letter}': {words}?",
        ),
        validation=(
            "Say how many words of this list use the letter '{letter}': {words}.",
            "The letter '{letter}' is in how many of these words: {words}?",
        ),
        test=(
            "How many words in the following list include the letter '{letter}': {words}?",
            "Find the number of words containing the letter '{letter}': {words}.",
        ),
    ),
}


@cache
def vocabulary() -> tuple[str, ...]:
    """Return the shipped words: distinct, lower case, 3 to 8 letters."""
    return tuple(files("dmoa.evaluation.suites").joinpath("words.txt").read_text(encoding="ascii").split())


@dataclass(frozen=True, kw_only=True)
class Words(Kind):
    """One question about a list of different words; a latent tuple is the words' numbers in order, then the choice made."""

    group: Asked
    length: int
    """Words in the list."""

    @cached_property
    def size(self) -> int:
        """Lists with repeats, times choices."""
        return int(len(vocabulary()) ** self.length * self._num_choices)

    @property
    def _num_choices(self) -> int:
        return {"pick": self.length, "count": len(_LETTERS)}.get(self.group, 1)

    @cached_property
    def num_tuples(self) -> int:
        """Ordered lists of different words, times choices; for `longest`, those with one longest word."""
        if self.group != "longest":
            return perm(len(vocabulary()), self.length) * self._num_choices
        num_of_length = Counter(map(len, vocabulary()))
        shorter = {length: sum(n for other, n in num_of_length.items() if other < length) for length in num_of_length}
        return sum(n * self.length * perm(shorter[length], self.length - 1) for length, n in num_of_length.items())

    @property
    def templates(self) -> Templates:
        return TEMPLATES[self.group]

    @property
    def answer_format(self) -> str:
        return _FORMATS[self.group]

    def latent(self, number: int) -> Latent | None:
        words = vocabulary()
        number, choice = divmod(number, self._num_choices)
        chosen = []
        for _ in range(self.length):
            number, word = divmod(number, len(words))
            chosen.append(word)
        if len(set(chosen)) < self.length:
            return None
        if self.group == "longest":
            lengths = [len(words[word]) for word in chosen]
            if lengths.count(max(lengths)) > 1:
                return None
        return (*chosen, choice)

    def root(self, latent: Latent) -> str:
        """Return the words, whatever their order and what is asked about them."""
        return " ".join(map(str, ("words", *sorted(latent[:-1]))))

    def ask(self, latent: Latent) -> Problem:
        words = [vocabulary()[number] for number in latent[:-1]]
        choice = latent[-1]
        fields: dict[str, object] = {"words": ", ".join(words)}
        match self.group:
            case "sort":
                return Problem(fields, ", ".join(sorted(words)), num_options=factorial(self.length))
            case "pick":
                return Problem({**fields, "n": choice + 1}, words[choice], num_options=self.length)
            case "longest":
                return Problem(fields, max(words, key=len), num_options=self.length)
            case "letters":
                return Problem(fields, str(sum(map(len, words))))
            case "count":
                letter = _LETTERS[choice]
                return Problem({**fields, "letter": letter}, str(sum(letter in word for word in words)))


def _kinds(length: int, *groups: Asked) -> tuple[Words, ...]:
    return tuple(Words(group=group, length=length) for group in groups)


WORDS = Suite(
    name="words",
    title="words (generated)",
    summary="Questions about lists of common English words: sort, name the n-th, find the longest, count letters or words.",
    levels=(
        Level(meaning="n-th of 3 words", kinds=_kinds(3, "pick")),
        Level(meaning="sorting and n-th of 3 words", kinds=_kinds(3, "sort", "pick")),
        Level(meaning="sorting, n-th and longest of 5 words", kinds=_kinds(5, "sort", "pick", "longest")),
        *(
            Level(meaning=f"sorting, n-th, longest and counting of {length} words", kinds=_kinds(length, *TEMPLATES))
            for length in (5, 10, 20)
        ),
    ),
)
"""The suite `words`."""
