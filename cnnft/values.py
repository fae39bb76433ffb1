"""What one setting may be: its type, its bounds, and texts that stand for numbers."""

from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args, get_origin

from cnnft.errors import UsageError

Channels = tuple[float, float, float]

_LARGEST_STATISTIC = 1e6


class Bounds(NamedTuple):
    """From `low` to `high`; those themselves too, but for what `without` names ("low", "high")."""

    low: float
    high: float = float("inf")
    without: tuple[str, ...] = ()

    def hold(self, value: float) -> bool:
        above = value > self.low if "low" in self.without else value >= self.low
        below = value < self.high if "high" in self.without else value <= self.high
        return above and below and value != float("inf")

    def __str__(self) -> str:
        words = f"{'above' if 'low' in self.without else 'at least'} {self.low:g}"
        if self.high == float("inf"):
            return words
        return f"{words}, {'below' if 'high' in self.without else 'at most'} {self.high:g}"


def above(low: float, high: float = float("inf")) -> Bounds:
    return Bounds(low, high, ("low",))


def below(low: float, high: float) -> Bounds:
    return Bounds(low, high, ("high",))


def between(low: float, high: float) -> Bounds:
    return Bounds(low, high, ("low", "high"))


def require_type(flag: str, value: object, annotation: Any) -> None:
    """Raises `UsageError` where the value, which may come from a config file, has another type."""
    if get_origin(annotation) is tuple:
        if isinstance(value, tuple) and all(
            isinstance(part, get_args(annotation)[0]) for part in value
        ):
            return
        raise UsageError(f"{flag} {value!r:.100} is not a list of texts")
    is_literal = get_origin(annotation) is Literal
    options = (annotation,) if is_literal else get_args(annotation) or (annotation,)
    literals = [option for option in options if get_origin(option) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    types = tuple(option for option in options if option not in literals)
    if float in types:
        types += (int,)
    if value in choices if choices and isinstance(value, str) else _is_a(value, types):
        return
    if choices:
        raise UsageError(f"{flag} {value!r:.100} is unknown: choose one of {', '.join(choices)}")
    raise UsageError(f"{flag} {value!r:.100} is not of the right type")


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def require_utf8(flag: str, value: object) -> None:
    """A run's files are UTF-8; a path may be any bytes, which Python holds as surrogates."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} {value!s:.100} is not UTF-8: rename it") from error


def parse_statistics(text: str) -> tuple[Channels, Channels]:
    """ "0.5,0.5,0.5/0.2,0.2,0.2" -> (mean, std) of red, green and blue, as shares of 255.

    Raises:
        UsageError: it has another form.
    """
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
        if not are_statistics(mean, std):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--normalize {text!r:.100}: give pretrained, dataset, or three means and three "
            "standard deviations, such as 0.5,0.5,0.5/0.2,0.2,0.2"
        ) from error
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def are_statistics(mean: tuple[object, ...], std: tuple[object, ...]) -> bool:
    """Whether these can be means and standard deviations of three channels.

    Their size is bounded so that float32 pixels survive them.
    """
    numbers = [value for value in (*mean, *std) if isinstance(value, int | float)]
    bounded = all(abs(value) <= _LARGEST_STATISTIC for value in numbers)
    spread = all(value >= 1 / _LARGEST_STATISTIC for value in numbers[3:])
    return len(mean) == len(std) == 3 and len(numbers) == 6 and bounded and spread


def parse_milestones(text: str) -> tuple[float, ...]:
    """ "30,60,90" -> (30.0, 60.0, 90.0), epochs in rising order.

    Raises:
        UsageError: it has another form.
    """
    try:
        epochs = tuple(float(part) for part in text.split(","))
        if not all(a < b for a, b in pairwise((0.0, *epochs, float("inf")))):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"milestones {text!r:.100}: give epochs in rising order, such as '30,60,90'"
        ) from error
    return epochs


def parse_interval(text: str) -> tuple[float, float]:
    """ "90s", "5m", "2h" -> (seconds, inf), "500" -> (inf, steps).

    Raises:
        UsageError: it has another form.
    """
    seconds = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    number = text if seconds is None else text[:-1]
    try:
        value = float(number) if seconds else int(number)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--checkpoint-every {text!r}: give a time such as 90s, 5m or 2h, or a number of steps"
        ) from error
    return (value * seconds, float("inf")) if seconds else (float("inf"), value)
