"""The command line made from the configuration dataclasses of :mod:`mesh.config`.

A value is what a flag says, else ``EXPERT_MESH_<FIELD>``, else the file of ``--config``, else
the field's default. Flags arrive here as text, so that one parser and one wording of its
complaints serve all three.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from mesh.errors import ConfigError

C = TypeVar("C")

_ENV_PREFIX = "EXPERT_MESH_"
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a configuration as the command line sees it."""

    name: str
    kind: Any
    """int, float, bool, str, Path or a Literal of strings."""
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """What may be said, where it is not free."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    def parse(self, value: object, source: str) -> Any:
        """Text, or what TOML made of it, as a value of ``kind``.

        Raises ConfigError, which names ``source``, when it is none.
        """
        if self.choices:
            if value in self.choices:
                return value
            raise ConfigError(f"{source}: {value!r} is none of {', '.join(self.choices)}")
        try:
            if self.kind is bool and isinstance(value, str):
                return _BOOLS[value.lower()]
            if isinstance(value, str) or type(value) is self.kind:
                return self.kind(value)
            if self.kind is float and type(value) is int:
                return float(value)
        except (ValueError, KeyError):
            pass
        raise ConfigError(f"{source}: {value!r} is not {_NOUNS.get(self.kind, 'a path')}")

    def parameter(self) -> inspect.Parameter:
        """How typer is told of it: text that may be absent, or a switch."""
        text = self.help
        if self.default not in (None, ""):
            text += (
                f" [default: {str(self.default).lower() if self.kind is bool else self.default}]"
            )
        if self.kind is bool:
            switch = f"{self.flag}/--no-{self.flag[2:]}"
            info = typer.Option(switch, help=text, show_default=False)
            annotation: Any = Annotated[bool | None, info]
        else:
            metavar = "|".join(self.choices) or self.kind.__name__.upper()
            info = typer.Option(self.flag, help=text, show_default=False, metavar=metavar)
            annotation = Annotated[str | None, info]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def options_of(*config_types: type, without: Iterable[str] = ()) -> tuple[Option, ...]:
    """The options of these dataclasses; a field that several of them have comes once."""
    options: dict[str, Option] = {}
    for config_type in config_types:
        hints = get_type_hints(config_type)
        for field in dataclasses.fields(config_type):
            if field.name not in without:
                option = Option(
                    name=field.name,
                    kind=_without_none(hints[field.name]),
                    default=field.default,
                    help=field.metadata.get("help", ""),
                )
                options.setdefault(field.name, option)
    return tuple(options.values())


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    return hint


def resolve(
    options: Sequence[Option],
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    file: Path | None,
) -> dict[str, Any]:
    """The value of every option that was said anywhere; ConfigError for one that makes no sense."""
    in_file = _read_file(file, {option.name for option in options})
    values: dict[str, Any] = {}
    for option in options:
        variable = _ENV_PREFIX + option.name.upper()
        flag = flags.get(option.name)
        if flag is not None:
            values[option.name] = option.parse(flag, option.flag)
        elif variable in environ:
            values[option.name] = option.parse(environ[variable], variable)
        elif option.name in in_file:
            values[option.name] = option.parse(in_file[option.name], f"{file}: {option.name}")
    return values


def _read_file(file: Path | None, known: set[str]) -> dict[str, object]:
    if file is None:
        return {}
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if unknown := values.keys() - known:
        raise ConfigError(f"{file}: no such option: {', '.join(sorted(unknown))}")
    return values


def build(config_type: type[C], values: Mapping[str, Any]) -> C:
    """The configuration with those of the values that it has a field for."""
    names = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{name: value for name, value in values.items() if name in names})


def to_argv(config: Any) -> list[str]:
    """The flags that make this configuration again."""
    argv: list[str] = []
    for option in options_of(type(config)):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        if option.kind is bool:
            argv.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            argv += [option.flag, str(value)]
    return argv


def without_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment less our own variables: a supervisor's are not its children's."""
    return {name: value for name, value in environ.items() if not name.startswith(_ENV_PREFIX)}


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of options, named as here.", show_default=False),
]


def command(
    options: Sequence[Option], run: Callable[[dict[str, Any]], None]
) -> Callable[..., None]:
    """A function for typer that has these options and ``--config``, and runs with their values."""

    def invoke(config: Path | None = None, **flags: str | bool | None) -> None:
        run(resolve(options, flags, os.environ, config))

    config_file = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile
    )
    parameters = [*(option.parameter() for option in options), config_file]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {p.name: p.annotation for p in parameters}
    invoke.__doc__ = run.__doc__
    return invoke
