"""Terminal output: progress bars, errors in one line, and clean stops on signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from extraction.core.errors import TraitFailures, TraitlineError
from extraction.core.text import one_line
from extraction.pipeline.pace import ExamplePace

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
NOTHING_WRITTEN = "stopped; nothing was written"
BAR = "{desc}: {n_fmt}/{total_fmt} examples |{bar}|{postfix}"


class Interrupted(BaseException):
    """Raised by a signal that stops this process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def complain(said: object) -> None:
    """Print the one line of an error."""
    click.echo(f"traitline: {one_line(said)}", err=True)


class _Usage(click.ClickException):
    """A wrong option or argument, in one line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        complain(self.message)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as failure:
        if isinstance(failure, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            raise
        path = failure.ctx.command_path if failure.ctx else "traitline"
        message = failure.format_message().rstrip(".")
        raise _Usage(f"{message}{'' if message.endswith(('?', ')')) else ';'} see {path} --help") from failure


class Command(click.Command):
    """A command whose errors are one line on stderr and exit code 2; a traceback only with --debug."""

    stopped = "stopped; finished shards are kept, and the same command goes on from there"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options."""
        with _usage_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print a TraitlineError as one line and exit with 2."""
        debug = ctx.params.pop("debug", False)
        with _stoppable():
            try:
                return super().invoke(ctx)
            except TraitlineError as failure:
                if debug:
                    raise
                for line in failure.lines() if isinstance(failure, TraitFailures) else [failure]:
                    complain(line)
                ctx.exit(2)
            except Interrupted as stop:
                complain(NOTHING_WRITTEN if ctx.params.get("dry_run") else self.stopped)
                ctx.exit(128 + stop.number)


class Serving(Command):
    """A command that serves; once it listens, the server handles signals."""

    stopped = "stopped before it listened"


class Study(Command):
    """A command that writes its result at the end, and whose `--alpha` takes any number of values."""

    stopped = NOTHING_WRITTEN

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options."""
        return super().parse_args(ctx, spread(args, "--alpha"))


def spread(words: Sequence[str], option: str) -> list[str]:
    """Rewrite `--alpha 0 -1,2` as `--alpha=0 --alpha=-1 --alpha=2`, as far as numbers or comma lists of them follow."""
    found: list[str] = []
    taking = False
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == option and not equals and _are_numbers(following):
            taking = True
            continue
        parts = value if name == option and equals else word if taking else ""
        taking = _are_numbers(parts)
        found += [f"{option}={part}" for part in parts.split(",")] if taking else [word]
    return found


def _are_numbers(text: str) -> bool:
    return all(map(_is_number, text.split(",")))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Group(click.Group):
    """Commands in named sections; a usage error is one line."""

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[click.Command]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        for commands in sections.values():
            for command in commands:
                self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of every section with the first sentence of their help."""
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(command.name or "", command.get_short_help_str(500)) for command in commands])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options."""
        with _usage_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Find the command and run it; a usage error is one line."""
        with _usage_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise Interrupted on the first SIGINT or SIGTERM; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread alone
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, lambda again, _: os._exit(128 + again))
        raise Interrupted(number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is stop:
                signal.signal(each, handler)


class Terminal:
    """Progress of stages: a bar with tokens/s and time left on a terminal, lines elsewhere.

    A stage may begin within another one; its bar is below.
    """

    def __init__(self) -> None:
        self._stages: list[_Stage] = []

    def note(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._stages:
            self._stages[-1].bar.write(one_line(text), file=sys.stderr)
        else:
            click.echo(one_line(text), err=True)

    def begin(
        self, title: str, n_examples: int, n_done: int, *, seconds_left: Callable[[], float | None] | None = None
    ) -> None:
        """Start a bar."""
        on_terminal = sys.stderr.isatty()
        if not on_terminal:
            self.note(f"{title}: {n_examples} examples" + (f", {n_done} of them done before" if n_done else ""))
        self._stages.append(_Stage(title, n_examples, n_done, on_terminal, seconds_left))

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Move the newest bar."""
        line = self._stages[-1].advance(n_examples, n_tokens)
        if line is not None:
            self.note(line)

    def end(self) -> None:
        """Close the newest bar."""
        if self._stages:
            self._stages.pop().bar.close()


class _Stage:
    """One bar, with the rate in tokens and the time left: by the stage's own estimate, or by examples per second."""

    def __init__(
        self,
        title: str,
        n_examples: int,
        n_done: int,
        on_terminal: bool,
        seconds_left: Callable[[], float | None] | None,
    ) -> None:
        from tqdm import tqdm

        self.title, self.done, self.tokens = title, n_done, 0
        self.pace = ExamplePace(n_examples - n_done)
        self.seconds_left = seconds_left or self.pace.seconds_left
        self.started = self.spoke = time.perf_counter()
        self.bar = tqdm(
            total=n_examples,
            initial=n_done,
            desc=title,
            file=sys.stderr,
            disable=not on_terminal,
            dynamic_ncols=True,
            miniters=0,  # tokens move the bar too
            bar_format=BAR,
        )

    def advance(self, n_examples: int, n_tokens: int) -> str | None:
        """Move the bar; where there is no terminal, return a line every 10 seconds."""
        self.tokens += n_tokens
        self.done += n_examples
        self.pace.advance(n_examples)
        now, seconds = time.perf_counter(), self.seconds_left()
        rate = f"{self.tokens / max(now - self.started, 1e-9):,.0f} tokens/s"
        left = "" if seconds is None else f"{rough_duration(seconds)} left"
        self.bar.set_postfix_str(f"{left}, {rate}" if left else rate, refresh=False)
        self.bar.update(n_examples)
        if not self.bar.disable or now - self.spoke <= SECONDS_BETWEEN_LINES:
            return None
        self.spoke = now
        return f"{self.title}: {self.done} of {self.bar.total} examples, {rate}" + (f", about {left}" if left else "")


def rough_duration(seconds: float) -> str:
    """Format a duration as coarsely as an estimate is known: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
