"""The flags of finetune: each comes from the declaration of its setting in `cnnft.config`."""

import dataclasses
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Optional, Union, get_args, get_origin

import typer

from cnnft.cli import options
from cnnft.config.options import metavar_of, option_of, shown_default
from cnnft.config.panels import PANELS
from cnnft.config.schema import FIELDS, flag


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose `**settings` are the settings that have a flag, listed by panel."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    first = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    flags = [_parameter(field) for field in FIELDS.values() if option_of(field).panel]
    rest = sorted([*(p for p in own if p not in first), *flags], key=_place)
    parameters = [*first, *rest]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _place(parameter: inspect.Parameter) -> int:
    return PANELS.index(get_args(parameter.annotation)[1].rich_help_panel)


def _parameter(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    """None, "not given", lets a config file supply the setting."""
    declared, kind = option_of(field), _typed(field.type)
    option = typer.Option(
        *([flag(field.name)] if declared.switch else []),
        rich_help_panel=declared.panel,
        show_default=False,
        help=options.with_default(declared.help, None if declared.switch else shown_default(field)),
        metavar=metavar_of(field),
        callback=options.batch_size if field.name == "batch_size" else None,
    )
    kind = Annotated[Optional[kind], option]  # noqa: UP045
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind
    )


def _typed(annotation: Any) -> Any:
    """What the command line takes for a field; where that may be of several types, a text."""
    if get_origin(annotation) is tuple:
        return list[str]
    union = get_origin(annotation) in (Union, UnionType)
    kinds = set(get_args(annotation) if union else [annotation]) - {type(None)}
    return kinds.pop() if len(kinds) == 1 else str
