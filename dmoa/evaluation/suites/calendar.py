"""Days, dates and durations of the Gregorian calendar; the suite `calendar`, and parts of `chain`."""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import date
from typing import Literal

from dmoa.evaluation.suites.suite import NUMBER_FORMAT, Kind, Latent, Level, Problem, Suite, Templates

Asked = Literal["after", "before", "between", "weekday-after", "duration", "weekday"]

_FIRST_YEAR, _NUM_YEARS = 1800, 400
"""Dates that questions start from; 400 years hold every pattern of leap years once."""
_FIRST_DAY = date(_FIRST_YEAR, 1, 1).toordinal()
NUM_DAYS = 146_097
_MIN_MONTH_DAYS, _MAX_MONTH_DAYS = 28, 31

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

DATE_FORMAT = "End with a line `Answer: ...`, a date as YYYY-MM-DD."
_WEEKDAY_FORMAT = "End with a line `Answer: ...`, the name of a weekday."
_FORMATS: dict[Asked, str] = {
    "after": DATE_FORMAT,
    "before": DATE_FORMAT,
    "between": NUMBER_FORMAT,
    "weekday-after": _WEEKDAY_FORMAT,
    "duration": DATE_FORMAT,
    "weekday": _WEEKDAY_FORMAT,
}

TEMPLATES: dict[Asked, Templates] = {
    "after": Templates(
        name="after",
        open=(
            "What date is {n} days after {first}?",
            "Add {n} days to the date {first}.",
            "Today is {first}. Which date is it in {n} days?",
            "Starting from {first}, which date comes {n} days later?",
        ),
        validation=(
            "Go {n} days forward from {first} and name the date.",
            "A parcel sent on {first} takes {n} days. When is it there?",
        ),
        test=("Which date do you reach {n} days after {first}?", "It is {first} now. Name the date {n} days from now."),
    ),
    "before": Templates(
        name="before",
        open=(
            "What date is {n} days before {last}?",
            "Subtract {n} days from the date {last}.",
            "Today is {last}. Which date was it {n} days ago?",
            "Counting back from {last}, which date was {n} days earlier?",
        ),
        validation=(
            "Go {n} days back from {last} and name the date.",
            "A parcel came on {last} after {n} days. When was it sent?",
        ),
        test=("Which date lies {n} days before {last}?", "It is {last} now. Name the date {n} days back."),
    ),
    "between": Templates(
        name="between",
        open=(
            "How many days is it from {first} to {last}?",
            "How many days after {first} is {last}?",
            "Count the days from {first} until {last}.",
            "Today is {first}. In how many days is it {last}?",
        ),
        validation=(
            "Give the number of days that pass from {first} to {last}.",
            "How long is it in days from {first} to {last}?",
        ),
        test=("What is the difference in days of the dates {first} and {last}?", "How many days lie {first} and {last} apart?"),
    ),
    "weekday-after": Templates(
        name="weekday-after",
        open=(
            "{first} is a {weekday}. Which weekday is it {n} days later?",
            "If {first} is a {weekday}, what day of the week comes {n} days after it?",
            "Today is {weekday}, {first}. Which day of the week is it in {n} days?",
            "The date {first} falls on a {weekday}. Which weekday follows {n} days later?",
        ),
        validation=(
            "Knowing that {first} is a {weekday}, name the weekday {n} days on.",
            "A trip starts on {weekday}, {first}. Which weekday is it after {n} days?",
        ),
        test=(
            "Given that {first} was a {weekday}, on which weekday are we {n} days later?",
            "We meet on {weekday}, {first}, and again {n} days later. Which weekday is that?",
        ),
    ),
    "duration": Templates(
        name="duration",
        open=(
            "What date is {weeks} weeks and {days} days after {first}?",
            "Add {weeks} weeks and {days} days to the date {first}.",
            "Today is {first}. Which date is it in {weeks} weeks and {days} days?",
            "A job starts on {first} and takes {weeks} weeks and {days} days. On which date is it done?",
        ),
        validation=(
            "Go {weeks} weeks and {days} days forward from {first} and name the date.",
            "Starting from {first}, which date do you reach in {weeks} weeks and {days} days?",
        ),
        test=(
            "Name the date that comes {weeks} weeks and {days} days after {first}.",
            "From {first}, wait {weeks} weeks and {days} days. Which date is it then?",
        ),
    ),
    "weekday": Templates(
        name="weekday",
        open=(
            "Which day of the week is {first}?",
            "What weekday is the date {first}?",
            "On which weekday does {first} fall?",
            "Name the weekday of {first}.",
        ),
        validation=("Find the day of the week of {first}.", "The date is {first}. What weekday is it?"),
        test=("Tell me on which day of the week {first} lies.", "Which weekday belongs to the date {first}?"),
    ),
}


def day_of(number: int) -> int:
    """Return a first day by its number, 0..`NUM_DAYS` - 1, as proleptic Gregorian ordinal (`date.toordinal`)."""
    return _FIRST_DAY + number


@dataclass(frozen=True, kw_only=True)
class Calendar(Kind):
    """One question about a first day and a number of days after it, `min_days`..`max_days` (0 for `weekday`)."""

    group: Asked
    min_days: int = 1
    max_days: int

    @property
    def size(self) -> int:
        """First days times numbers of days."""
        return NUM_DAYS * (self.max_days - self.min_days + 1)

    @property
    def templates(self) -> Templates:
        return TEMPLATES[self.group]

    @property
    def answer_format(self) -> str:
        return _FORMATS[self.group]

    def latent(self, number: int) -> Latent | None:
        """Return the first day's ordinal and the number of days."""
        days, first = divmod(number, NUM_DAYS)
        return day_of(first), self.min_days + days

    def root(self, latent: Latent) -> str:
        """Return the two dates, whatever is asked about them."""
        return f"days {latent[0]} {latent[1]}"

    def ask(self, latent: Latent) -> Problem:
        first, last = date.fromordinal(latent[0]), date.fromordinal(latent[0] + latent[1])
        fields: dict[str, object] = {"n": latent[1], "first": first.isoformat(), "last": last.isoformat()}
        match self.group:
            case "after":
                return Problem(fields, last.isoformat())
            case "before":
                return Problem(fields, first.isoformat())
            case "between":
                return Problem(fields, str(latent[1]))
            case "duration":
                weeks, days = divmod(latent[1], 7)
                return Problem({**fields, "weeks": weeks, "days": days}, last.isoformat())
            case "weekday-after" | "weekday":
                return Problem({**fields, "weekday": WEEKDAYS[first.weekday()]}, WEEKDAYS[last.weekday()], len(WEEKDAYS))


@dataclass(frozen=True, kw_only=True)
class WithinMonth(Calendar):
    """The same of two days of one month."""

    max_days: int = _MAX_MONTH_DAYS

    @property
    def size(self) -> int:
        """Months times pairs of days of the longest month."""
        return 12 * _NUM_YEARS * _MAX_MONTH_DAYS**2

    @property
    def num_tuples(self) -> int:
        """Counted month by month."""
        lengths = [monthrange(_FIRST_YEAR + month // 12, month % 12 + 1)[1] for month in range(12 * _NUM_YEARS)]
        return sum(length - days for length in lengths for days in range(1, min(self.max_days, length - 1) + 1))

    def latent(self, number: int) -> Latent | None:
        """Return the first day's ordinal and the number of days."""
        number, first = divmod(number, _MAX_MONTH_DAYS)
        month, days = divmod(number, _MAX_MONTH_DAYS)
        last = first + 1 + days
        if not 1 <= days <= self.max_days or last > _MAX_MONTH_DAYS:
            return None
        year, month = _FIRST_YEAR + month // 12, month % 12 + 1
        if last > _MIN_MONTH_DAYS and last > monthrange(year, month)[1]:
            return None
        return date(year, month, first + 1).toordinal(), days


_WITHIN_MONTH: tuple[Asked, ...] = ("after", "between", "weekday-after")
_ACROSS_MONTHS: tuple[Asked, ...] = ("after", "before", "between", "weekday-after")

CALENDAR = Suite(
    name="calendar",
    title="calendar (generated)",
    summary="Days, dates and durations of the Gregorian calendar from 1800 on, leap years included.",
    levels=(
        Level(meaning="the weekday one day on", kinds=(WithinMonth(group="weekday-after", max_days=1),)),
        Level(meaning="two days of one month", kinds=tuple(WithinMonth(group=group) for group in _WITHIN_MONTH)),
        Level(
            meaning="up to 60 days, across months",
            kinds=(
                *(Calendar(group=group, max_days=60) for group in _ACROSS_MONTHS),
                Calendar(group="duration", min_days=15, max_days=62),
            ),
        ),
        Level(
            meaning="up to 4000 days, across years, and weekdays of dates",
            kinds=(
                *(Calendar(group=group, max_days=4000) for group in _ACROSS_MONTHS),
                Calendar(group="duration", min_days=15, max_days=4000),
                Calendar(group="weekday", min_days=0, max_days=0),
            ),
        ),
    ),
)
"""The suite `calendar`."""
