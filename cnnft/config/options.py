"""An option, declared once: the field of a section carries type, default, bounds, help and flag.

The command, the config file, the error sentences and docs/options.md all come from it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from cnnft.errors import UsageError, why_not_utf8

LARGEST = 1e100
"""Of any number in a setting, so that their products and quotients are still finite."""
_WIDEST_METAVAR = 13  # characters; what is beside it in 80 columns shall not be broken


class Bounds(NamedTuple):
    """From `low` to `high`, without those that `excluded` names ("low", "high")."""

    low: float
    high: float = float("inf")
    excluded: tuple[str, ...] = ()

    def hold(self, value: float) -> bool:
        above = value > self.low if "low" in self.excluded else value >= self.low
        below = value < self.high if "high" in self.excluded else value <= self.high
        return above and below and value <= LARGEST

    def __str__(self) -> str:
        words = f"{'above' if 'low' in self.excluded else 'at least'} {self.low:g}"
        if self.high == float("inf"):
            return words
        return f"{words}, {'below' if 'high' in self.excluded else 'at most'} {self.high:g}"


def above(low: float, high: float = float("inf")) -> Bounds:
    return Bounds(low, high, ("low",))


def below(low: float, high: float) -> Bounds:
    return Bounds(low, high, ("high",))


def between(low: float, high: float) -> Bounds:
    return Bounds(low, high, ("low", "high"))


@dataclass(frozen=True)
class Option:
    """What a field of a section says of itself, beside its name, type and default."""

    help: str
    bounds: Bounds | None = None
    """Of a number."""
    panel: str | None = None
    """Where `--help` lists it; None: a rare setting, which the config file alone has."""
    shown: str | None = None
    """The default in words; None: the value itself."""
    metavar: str | None = None
    switch: bool = False
    """On or not given: there is no --no-..."""
    saved: bool = True
    """False: an order for one occasion, not part of what a run saves."""


def option(default: Any, help: str, **declared: Any) -> Any:
    """A field of a section; `declared` are the other fields of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **declared)})


def option_of(field: "dataclasses.Field[Any]") -> Option:
    found: Option = field.metadata["option"]
    return found


def shown_default(field: "dataclasses.Field[Any]") -> str:
    """In words, or the value as a config file has it."""
    shown, value = option_of(field).shown, field.default
    if shown is not None:
        return shown
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def metavar_of(field: "dataclasses.Field[Any]") -> str | None:
    """What stands for the value in `--help`: declared; a few choices; the name of many."""
    choices = "|".join(choices_of(field.type))
    if not choices or option_of(field).metavar:
        return option_of(field).metavar
    return choices if len(choices) <= _WIDEST_METAVAR else field.name.rpartition("_")[2].upper()


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The texts of its Literals."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in choices_of(part))


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """How the user knows the setting: by its flag, or by its name in a config file."""
    if option_of(field).panel is None:
        return field.name
    return "--" + field.name.replace("_", "-")


def validate(section: Any) -> None:
    """Raises `UsageError` where a field of the section has another type or is out of bounds."""
    for field in dataclasses.fields(section):
        validate_value(field, getattr(section, field.name))


def validate_value(field: "dataclasses.Field[Any]", value: object) -> None:
    """Raises `UsageError` where it is of another type than the field's, or out of bounds."""
    flag, bounds = flag_of(field), option_of(field).bounds
    _require_type(flag, value, field.type)
    _require_utf8(flag, value)
    if bounds is not None and isinstance(value, int | float) and not bounds.hold(value):
        words = f"{LARGEST:g} at most" if value > LARGEST else bounds
        raise UsageError(f"{flag} {value!s:.100} is out of range: it must be {words}")


def _require_type(flag: str, value: object, annotation: Any) -> None:
    """A value from a config file may have any type."""
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


def _require_utf8(flag: str, value: object) -> None:
    """A run's files are UTF-8; a path may be any bytes, which Python holds as surrogates."""
    if reason := why_not_utf8(str(value)):
        raise UsageError(f"{flag} {value!s:.100} {reason}")
