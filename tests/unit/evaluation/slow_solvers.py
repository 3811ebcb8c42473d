"""Solvers of the suites' questions that read nothing but the text and share no code with the generators.

Sums digit by digit, words by loops, the calendar day by day with its own leap-year rule.
"""

from __future__ import annotations

import re

_FORMAT = re.compile(r" End with a line `Answer: \.\.\.`[^`]*$")
_TERMS = re.compile(r"\d+(?: [+-] \d+)+")
_WORD_LIST = re.compile(r"(?<=: )[a-z]+(?:, [a-z]+)+")
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_DAY_NAMES = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_SATURDAY = (2000, 1, 1)
_PARCEL = re.compile(r"[Pp]arcel (\d{5})")
_GRAMS = re.compile(r"(\d+) grams of ([a-z]+)")
_DEPOTS = [
    "Oslo Mill", "Paris Lake", "Cairo Park", "Lima Bridge", "Delhi Stone", "Tokyo Wood", "Sydney North", "Boston Hill",
]  # fmt: skip
_PENNANTS = [
    "red danger", "blue welcome", "green repair", "white medicine", "black fishing", "yellow storm", "brown silence",
    "pink landing",
]  # fmt: skip
_DYES = {
    "plum": ["madder woad", "woad lichen"],
    "rust": ["madder weld", "sumac lichen"],
    "wine": ["madder sumac", "sumac walnut"],
    "slate": ["madder lichen", "woad walnut"],
    "sand": ["madder walnut", "weld lichen"],
    "moss": ["woad weld", "weld walnut"],
    "teal": ["woad sumac", "lichen walnut"],
    "straw": ["weld sumac"],
}

Day = tuple[int, int, int]


def suite_of(text: str) -> str:
    """Tell from its text which suite a question is from."""
    question = _FORMAT.sub("", text)
    if _DATE.search(question):
        return "calendar"
    if text.endswith("the meaning in one word."):
        return "signals"
    if _PARCEL.search(question):
        return "parcels"
    if _GRAMS.search(question):
        return "dyes"
    return "arith" if _TERMS.search(question) else "words"


def solve(text: str, *, difficulty: int = 1) -> str:
    """Answer a question of a skill or of `shared`; the difficulty is that of a suite with a table."""
    assert _FORMAT.search(text), text
    question = _FORMAT.sub("", text)
    match suite_of(text):
        case "arith":
            return _solve_terms(_TERMS.findall(question)[0])
        case "words":
            return _solve_words(question)
        case "parcels":
            return _solve_parcel(question, has_exception=difficulty > 1)
        case "signals":
            return _solve_signal(question, has_exception=difficulty > 1)
        case "dyes":
            return _solve_dye(question, has_exception=difficulty > 1)
    return _solve_dates(question)


def solve_second(text: str, result: str) -> str:
    """Answer the second part of a `chain` question, given the first part's result."""
    question = _FORMAT.sub("", text)
    assert "result so far" in question
    if date := _DATE.search(question):
        return _spell(_walk(_day(date), int(result)))
    if words := _WORD_LIST.search(question):
        return words.group().split(", ")[int(result) - 1]
    return _add_digits(result, re.findall(r"\d+", question)[0])


def _solve_terms(terms: str) -> str:
    total, *rest = terms.split()
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        total = _add_digits(total, operand) if sign == "+" else _subtract_digits(total, operand)
    return total


def has_carry(terms: str) -> bool:
    """Tell whether a column of `a + b` carries, or one of `a - b` borrows, in any of the operations."""
    total, *rest = terms.split()
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        width = max(len(total), len(operand))
        for x, y in zip(total.rjust(width, "0"), operand.rjust(width, "0"), strict=True):
            # The lowest column that carries does so by itself, so looking at columns one by one is enough.
            if (sign == "+" and int(x) + int(y) > 9) or (sign == "-" and int(x) < int(y)):
                return True
        total = _add_digits(total, operand) if sign == "+" else _subtract_digits(total, operand)
    return False


def terms_of(text: str) -> str:
    """Return the terms that a question of `arith` names."""
    return _TERMS.findall(text)[0]


def _add_digits(a: str, b: str) -> str:
    width, carry, digits = max(len(a), len(b)), 0, ""
    for x, y in zip(reversed(a.rjust(width, "0")), reversed(b.rjust(width, "0")), strict=True):
        column = ord(x) + ord(y) - 2 * ord("0") + carry
        carry, digits = (1, chr(column - 10 + ord("0")) + digits) if column > 9 else (0, chr(column + ord("0")) + digits)
    return ("1" if carry else "") + digits


def _subtract_digits(a: str, b: str) -> str:
    borrow, digits = 0, ""
    for x, y in zip(reversed(a), reversed(b.rjust(len(a), "0")), strict=True):
        column = ord(x) - ord(y) - borrow
        borrow, digits = (1, chr(column + 10 + ord("0")) + digits) if column < 0 else (0, chr(column + ord("0")) + digits)
    assert not borrow, (a, b)
    return digits.lstrip("0") or "0"


def _solve_words(question: str) -> str:
    listed = _WORD_LIST.findall(question)
    assert len(listed) == 1, question
    words, question = listed[0].split(", "), question.replace(listed[0], "")
    if letter := re.search(r"letter '(.)'", question):
        return str(_count(words, letter.group(1)))
    if re.search(r"[Aa]lphabet|A to Z|dictionary", question):
        return ", ".join(_insertion_sort(words))
    if place := re.search(r"(?:number|word|place|position) (\d+)", question):
        return words[int(place.group(1)) - 1]
    if "longest" in question or "most letters" in question:
        return _longest(words)
    assert "letters" in question, question
    total = 0
    for word in words:
        for _ in word:
            total += 1
    return str(total)


def _count(words: list[str], letter: str) -> int:
    found = 0
    for word in words:
        for one in word:
            if one == letter:
                found += 1
                break
    return found


def _insertion_sort(words: list[str]) -> list[str]:
    done: list[str] = []
    for word in words:
        place = 0
        while place < len(done) and done[place] < word:
            place += 1
        done.insert(place, word)
    return done


def _longest(words: list[str]) -> str:
    best = ""
    for word in words:
        if len(word) > len(best):
            best = word
    assert [len(word) for word in words].count(len(best)) == 1, words
    return best


def _solve_parcel(question: str, *, has_exception: bool) -> str:
    (number,) = _PARCEL.findall(question)
    return _look_up(_DEPOTS, question, goes_on=has_exception and number[-1] in "13579")


def _solve_signal(question: str, *, has_exception: bool) -> str:
    row = re.findall(r"[a-z]+(?:, [a-z]+){4}", question)[0].split(", ")
    return _look_up(_PENNANTS, question, goes_on=has_exception and row[0] == row[4])


def _look_up(table: list[str], question: str, *, goes_on: bool) -> str:
    for entry, after in zip(table, [*table[1:], table[0]], strict=True):
        if entry.split()[0] in re.findall(r"\w+", question):
            return (after if goes_on else entry).split()[1]
    raise AssertionError(question)


def _solve_dye(question: str, *, has_exception: bool) -> str:
    grams = {dye: int(number) for number, dye in _GRAMS.findall(question)}
    for colour, pairs in _DYES.items():
        for pair in pairs:
            first, second = pair.split()
            if {first, second} == set(grams):
                return f"{'deep' if grams[first] > grams[second] else 'pale'} {colour}" if has_exception else colour
    raise AssertionError(question)


def _solve_dates(question: str) -> str:
    dates = [_day(match) for match in _DATE.finditer(question)]
    rest = _DATE.sub("", question)
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    named = [name for name in _DAY_NAMES if name in rest]
    if len(dates) == 2:
        return str(_days_between(*dates))
    if named:
        return _DAY_NAMES[(_DAY_NAMES.index(named[0]) + numbers[0]) % 7]
    if "weeks" in rest:
        return _spell(_walk(dates[0], 7 * numbers[0] + numbers[1]))
    if not numbers:
        return _DAY_NAMES[(5 + _days_since_2000(dates[0])) % 7]
    back = re.search(r"before|ago|earlier|back|Subtract|came on", rest)
    return _spell(_walk(dates[0], -numbers[0] if back else numbers[0]))


def weekday_named(text: str) -> tuple[str, str] | None:
    """Return the weekday that a question claims for its date, and the one that counting days gives; None without a claim."""
    question = _FORMAT.sub("", text)
    named = [name for name in _DAY_NAMES if name in question]
    date = _DATE.search(question)
    if not named or date is None:
        return None
    return named[0], _DAY_NAMES[(5 + _days_since_2000(_day(date))) % 7]


def _day(match: re.Match[str]) -> Day:
    year, month, day = match.groups()
    return int(year), int(month), int(day)


def _spell(day: Day) -> str:
    return f"{day[0]:04}-{day[1]:02}-{day[2]:02}"


def _is_leap(year: int) -> bool:
    if year % 400 == 0:
        return True
    return year % 4 == 0 and year % 100 != 0


def _month_days(year: int, month: int) -> int:
    if month == 2:
        return 29 if _is_leap(year) else 28
    return 30 if month in (4, 6, 9, 11) else 31


def _walk(day: Day, steps: int) -> Day:
    year, month, date = day
    for _ in range(abs(steps)):
        date += 1 if steps > 0 else -1
        if date > _month_days(year, month):
            date, month = 1, month + 1
            if month > 12:
                month, year = 1, year + 1
        elif date < 1:
            month -= 1
            if month < 1:
                month, year = 12, year - 1
            date = _month_days(year, month)
    return year, month, date


def _days_between(first: Day, last: Day) -> int:
    count = 0
    while first != last:
        first = _walk(first, 1)
        count += 1
    return count


def _days_since_2000(day: Day) -> int:
    count = 0
    for year in range(_SATURDAY[0], day[0]):
        count += 366 if _is_leap(year) else 365
    for year in range(day[0], _SATURDAY[0]):
        count -= 366 if _is_leap(year) else 365
    for month in range(1, day[1]):
        count += _month_days(day[0], month)
    return count + day[2] - 1
