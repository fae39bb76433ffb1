"""Settings that are texts which stand for numbers."""

from itertools import pairwise

from cnnft.errors import UsageError

Channels = tuple[float, float, float]
"""One number for each of red, green and blue."""

_LARGEST_STATISTIC = 1e6
VIEWS = {"none": 1, "hflip": 2, "five-crop": 5, "ten-crop": 10, "multiscale": 50}
"""Views of an image in each set of test-time augmentation; beside them there is random:K."""
_MOST_VIEWS = 1000


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


def view_count(name: str) -> int:
    """How many views of an image a set has: "ten-crop" -> 10, "random:16" -> 16.

    Raises:
        UsageError: there is no such set.
    """
    count = name.removeprefix("random:")
    if count != name and count.isdecimal() and 1 <= int(count) <= _MOST_VIEWS:
        return int(count)
    if name not in VIEWS:
        raise UsageError(
            f"--tta {name!r:.100}: choose one of {', '.join(VIEWS)}, or random:K with K from 1 to "
            f"{_MOST_VIEWS}"
        )
    return VIEWS[name]


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
            f"--checkpoint-every {text!r:.100}: give a time such as 90s, 5m or 2h, or a number "
            "of steps"
        ) from error
    return (value * seconds, float("inf")) if seconds else (float("inf"), value)
