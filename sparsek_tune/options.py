"""Options that several commands have, what they complete to, and what they mean."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from sparsek_tune.command import NO_GPU, Fault, check_writable
from sparsek_tune.db import reader
from sparsek_tune.presets import MODELS, Shape
from sparsek_tune.presets import shapes as all_shapes
from sparsek_tune.problem import DTYPES, GATES, TARGETS, Device, current_device, target_device

FIELDS = tuple(Shape.__dataclass_fields__)
_WORDS = {"dtype": DTYPES, "gate": GATES}  # fields that are no numbers


def _complete_shape(_context: click.Context, _option: click.Parameter, typed: str) -> list[str]:
    """The fields that the shape does not have yet; the values of one that is no number."""
    before, comma, last = typed.rpartition(",")
    name, sign, value = last.partition("=")
    if sign:
        return [f"{before}{comma}{name}={word}" for word in _WORDS.get(name, ()) if word.startswith(value)]
    given = {part.partition("=")[0] for part in before.split(",")}
    return [f"{before}{comma}{field}=" for field in FIELDS if field.startswith(name) and field not in given]


def _complete_target(_context: click.Context, _option: click.Parameter, typed: str) -> list[str]:
    return [target for target in TARGETS if target.startswith(typed)]


class _Storage(click.ParamType):
    """A Path, or the URL of a server as text."""

    name = "storage"

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        given = ctx and param and param.name and ctx.get_parameter_source(param.name)
        hint = STORAGE if given == ParameterSource.ENVIRONMENT else None
        raise click.BadParameter(message, ctx, param, hint)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if not value:
            self.fail(f"must be a file or {SERVER}USER@HOST/DATABASE, but is empty", param, ctx)
        if "://" not in value:
            return reader.file_of(value)
        if not value.startswith(SERVER):
            kind = value.partition("://")[0]
            self.fail(f"must be a file or {SERVER}USER@HOST/DATABASE, but is {kind}://...", param, ctx)
        return value


class Number(click.FloatRange):
    """A number within a range; neither nan, which every comparison lets through, nor infinite."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def given() -> set[str]:
    """The options that the command line has; not those that the environment or a default gives."""
    context = click.get_current_context()
    return {
        option.opts[0] for option in context.command.params
        if option.name and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE
    }  # fmt: skip


def plot_option(what: str) -> Callable[..., Any]:
    return click.option(
        "--plot", "plot_file", metavar="FILE", type=click.Path(path_type=Path), help=f"{what} (.png, .svg or .pdf)."
    )


def check_plot(file: Path | None, extra: str) -> None:
    """What would keep a plot from being drawn is found out before anything takes long. extra: that of this package
    which brings what is needed. Raises click's errors."""
    from sparsek_tune.bench import plot

    if file is None:
        return
    if file.suffix not in plot.SUFFIXES:
        raise click.BadParameter(f"must end in {', '.join(plot.SUFFIXES)}, but is {file}", param_hint="--plot")
    if why := plot.available(extra):
        raise click.UsageError(f"--plot: {why}")
    check_writable(file)


SERVER = "postgresql+psycopg://"
STORAGE = "SPARSEK_TUNE_STORAGE"  # an environment variable: a command line, and a password in it, shows to everybody
storage_option = click.option(
    "--storage", metavar="FILE|URL", type=_Storage(), envvar=STORAGE,
    help=f"The database: a file (of a directory, cache.db in it), or a server as {SERVER}USER@HOST/DATABASE "
    f"[default: ${STORAGE}, $SPARSEK_TUNE_CACHE, or a file in the user's cache directory].",
)  # fmt: skip


@contextmanager
def as_file(storage: Path | str | None) -> Iterator[Path | None]:
    """What --storage names as a file, which is all that the runtime reads: of a server, a snapshot for the while.
    Raises DatabaseError where what is named cannot be read."""
    if storage is None or isinstance(storage, Path):
        if storage is not None:
            reader.connect(storage).close()
        yield storage
        return
    from sparsek_tune.db import transfer
    from sparsek_tune.db.store import Store

    with tempfile.TemporaryDirectory() as scratch, Store(storage, read_only=True) as store:
        transfer.snapshot(store, file := Path(scratch) / "snapshot.db")
        yield file


device_option = click.option("--device", "index", type=click.IntRange(0), help="CUDA device index [default: 0].")
target_option = click.option(
    "--target", metavar="cuda:CC", shell_complete=_complete_target,
    help="A GPU to be named, not looked at, such as cuda:90.",
)  # fmt: skip
_model_option = click.option(
    "--model", "models", multiple=True, metavar="NAME", type=click.Choice(list(MODELS)),
    help=f"Heads and head size of a published model; repeatable. One of: {', '.join(MODELS)}.",
)  # fmt: skip
_shape_option = click.option(
    "--shape", "texts", multiple=True, metavar="F=V,...", shell_complete=_complete_shape,
    help=f"Fields of a shape, the rest from --model or the defaults; repeatable. Fields: {','.join(FIELDS)}. "
    f"Defaults: {','.join(f'{f}={getattr(Shape(), f)}' for f in FIELDS)}.",
)  # fmt: skip


def shape_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return _model_option(_shape_option(command))


def shapes(models: tuple[str, ...], texts: tuple[str, ...]) -> list[Shape]:
    """What --model and --shape name."""
    try:
        return all_shapes(models, texts)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shape") from error


def target(text: str) -> Device:
    """What --target names."""
    try:
        return target_device(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--target") from error


def gpu(index: int | None) -> Device | None:
    """The GPU, None where there is none and none was asked for. An index that does not exist is an error.

    GPU ``index`` becomes the only one that this process and its workers see: they all speak of GPU 0.
    """
    if index is not None:
        hide_others(index)
    try:
        return current_device()
    except RuntimeError as error:
        if index is None:
            return None
        raise Fault(f"--device must be the index of a GPU, but is {index}: {error}", NO_GPU) from error


def gpus(text: str) -> dict[int, Device]:
    """The GPUs that --gpus names ("all", "0,2"), by index, in that order."""
    import torch

    parts = [part.strip() for part in text.split(",")]
    if text != "all" and not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f'must be "all" or indices of GPUs such as 0,2, but is {text!r}', param_hint="--gpus")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise Fault("--gpus needs a GPU, and there is none here", NO_GPU)
    indices = range(count) if text == "all" else dict.fromkeys(map(int, parts))
    if (most := max(indices)) >= count:
        raise Fault(f"--gpus must name indices below {count}, but names {most}", NO_GPU)
    return {index: current_device(index) for index in indices}


def hide_others(index: int) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    if names is not None and index >= len(names):
        raise Fault(f"--device must be below {len(names)} (CUDA_VISIBLE_DEVICES={visible}), but is {index}", NO_GPU)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if names is None else names[index]
