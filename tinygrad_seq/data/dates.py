"""Written dates and their ISO form, a small translation task. Imports creation and errors."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from tinygrad_seq.creation import Rng, generator
from tinygrad_seq.errors import whole

# English whatever the locale, unlike strftime's.
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()

_FORMS: tuple[Callable[[date], str], ...] = (
    lambda d: f"{d.day} {_month(d)} {d.year}",  # 3 May 1987
    lambda d: f"{d.day:02} {_month(d)[:3]} {d.year}",  # 03 May 1987
    lambda d: f"{d.day}-{_month(d)[:3]}-{d.year}",  # 3-May-1987
    lambda d: f"{_nth(d)} of {_month(d)} {d.year}",  # 3rd of May 1987
    lambda d: f"the {_nth(d)} of {_month(d)}, {d.year}",  # the 3rd of May, 1987
    lambda d: f"{_month(d)} {d.day}, {d.year}",  # May 3, 1987
    lambda d: f"{_month(d)} {_nth(d)}, {d.year}",  # May 3rd, 1987
    lambda d: f"{_month(d)[:3]} {d.day} {d.year}",  # May 3 1987
    lambda d: f"{_weekday(d)} {d.day} {_month(d)} {d.year}",  # Sunday 3 May 1987
    lambda d: f"{_weekday(d)}, {_month(d)} {_nth(d)}, {d.year}",  # Sunday, May 3rd, 1987
    lambda d: f"{_weekday(d)[:3]}, {d.day:02} {_month(d)[:3]} {d.year}",  # Sun, 03 May 1987
    lambda d: f"{d.year} {_month(d)} {d.day}",  # 1987 May 3
    lambda d: f"{d.year}, {_month(d)} the {_nth(d)}",  # 1987, May the 3rd
    lambda d: f"{_month(d).lower()} {d.day} {d.year}",  # may 3 1987
    lambda d: f"{d.day} {_month(d).upper()} {d.year}",  # 3 MAY 1987
)


def written_dates(
    count: int, *, first_year: int = 1900, last_year: int = 2099, rng: Rng = None
) -> tuple[list[str], list[str]]:
    """Dates as people write them, and as ISO 8601 does: ``"3rd of May 1987"``, ``"1987-05-03"``.

    Two lists of ``count`` texts, sources and targets, each day of the years as likely and each of
    15 forms, in English. Forms that leave open which day is meant, such as 03/05/1987 or '87, are
    not among them. Years have four digits, so that every target has ten characters. The same date
    may come twice.

    The usual first exercise in translation with attention (course Sequence Models, Ng et al. 2017;
    attention: Bahdanau, Cho and Bengio 2015). Who writes a day at random, without reading: right
    once in as many days as there are, a cross-entropy of ln(days) for each date; from 1900 to 2099,
    ln 73049 = 11.20, 1.12 a character.
    """
    count = whole(count, "written_dates: count")
    first_year = whole(first_year, "written_dates: first_year")
    last_year = whole(last_year, "written_dates: last_year")
    if not 1000 <= first_year <= last_year <= 9999:
        raise ValueError(
            f"written_dates: first_year = {first_year} and last_year = {last_year} were given, "
            "expected years from 1000 to 9999, the last no earlier than the first"
        )
    draw = generator(rng)
    first, last = date(first_year, 1, 1).toordinal(), date(last_year, 12, 31).toordinal()
    days = [date.fromordinal(n) for n in draw.integers(first, last + 1, count).tolist()]
    forms = draw.integers(len(_FORMS), size=count).tolist()
    sources = [_FORMS[form](day) for form, day in zip(forms, days, strict=True)]
    return sources, [day.isoformat() for day in days]


def _month(day: date) -> str:
    return _MONTHS[day.month - 1]


def _weekday(day: date) -> str:
    return _DAYS[day.weekday()]


def _nth(day: date) -> str:
    """The day of the month as an ordinal: 1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return f"{day.day}{ending}"
