"""The conversation: lines in, answers out, in a terminal or through pipes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.live import Live
from rich.table import Table
from rich.text import Text

from srppo.chat.speaker import Answer, Speaker
from srppo.errors import ConfigError, SrppoError
from srppo.progress import VISIBLE, console

HELP = """\
/reset            forget the conversation
/system TEXT      begin anew with this system message; without TEXT: with none
/temperature T    sample from the whole distribution at T; 0 is greedy
/quit             leave; so does Ctrl-D
Ctrl-C ends an answer. A line that ends in \\ goes on in the next one.
A space in front of / sends the line as it is."""


class Conversation:
    """One user, one model or several that hear the same turns and give answers of their own."""

    def __init__(self, speakers: list[Speaker], seed: int) -> None:
        self.speakers = speakers
        self.seed = seed
        """The next answers'."""
        self.interactive = sys.stdin.isatty()
        self.out = console(file=sys.stdout, soft_wrap=True)
        self.notes = console(stderr=True, soft_wrap=True)
        """So that standard output holds answers and nothing else."""

    def run(self) -> None:
        """Until the input ends, or /quit. Without a terminal the first error ends it, too."""
        self.introduce()
        for line in self._lines():
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        return
                elif line.strip():
                    self.turn(line)
            except SrppoError as e:
                if not self.interactive:
                    raise
                self.note(f"error: {e}", style="red")
            except KeyboardInterrupt:  # the second Ctrl-C in one answer
                if not self.interactive:
                    raise
                self.note("\n(stopped, and this turn forgotten)")

    def introduce(self) -> None:
        """Who is there, and how each one samples."""
        for speaker in self.speakers:
            self.note(f"{speaker.name}: {speaker.describe()}")
        if self.interactive:
            self.note("Ctrl-C ends an answer, /quit the conversation; /help says what else.")

    def turn(self, text: str) -> None:
        """All models answer; if one of them cannot hear the turn, it is nobody's."""
        for speaker in self.speakers:
            speaker.hear(text)
        seed, self.seed = self.seed, self.seed + 1
        if len(self.speakers) > 1 and self.interactive and self.out.is_terminal:
            self._side_by_side(text, seed)
            return
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self._write(f"{speaker.name}: ")
            with self._ctrl_c() as pressed:
                answer = speaker.answer(text, self._write, seed, pressed)
            self._write("\n")
            if remark := _remark(answer):
                self.note(remark)

    def note(self, text: str, style: str = "dim") -> None:
        """A line that is not an answer."""
        self.notes.print(text, style=style)

    def _side_by_side(self, prompt: str, seed: int) -> None:
        """A column for each model, filled one after the other."""
        columns = [Text() for _ in self.speakers]
        remarks = [""] * len(columns)
        with Live(console=self.out, auto_refresh=False) as live:

            def show() -> None:
                live.update(_table(self.speakers, columns, remarks), refresh=True)

            for i, speaker in enumerate(self.speakers):

                def say(piece: str, column: Text = columns[i]) -> None:
                    column.append(piece.translate(VISIBLE))
                    show()

                with self._ctrl_c() as pressed:
                    remarks[i] = _remark(speaker.answer(prompt, say, seed, pressed))
                show()

    def _write(self, text: str) -> None:
        self.out.file.write(text.translate(VISIBLE))
        self.out.file.flush()

    @contextmanager
    def _ctrl_c(self) -> Iterator[Callable[[], bool]]:
        """Whether Ctrl-C was pressed: it ends an answer between two tokens. Pressed again, or
        without a terminal, it interrupts as everywhere."""
        pressed = False

        def press(signum: int, frame: object) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True

        before = signal.signal(signal.SIGINT, press) if self.interactive else None
        try:
            yield lambda: pressed
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def _lines(self) -> Iterator[str]:
        """What the user enters; lines that end in a backslash are joined with the next."""
        if self.interactive:
            import readline  # noqa: F401 - input() then edits lines and remembers them
        parts: list[str] = []
        while True:
            try:
                line = input(("… " if parts else "> ") if self.interactive else "")
                line.encode()  # where the locale is C, bytes that are no text come as surrogates
            except UnicodeError as e:
                raise ConfigError(
                    f"standard input is not UTF-8 ({e}): no model could read it. "
                    "Convert what is piped in, as with iconv -t UTF-8."
                ) from e
            except EOFError:
                if self.interactive:
                    self.note("")
                if parts:
                    yield "\n".join(parts)
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                parts = []
                self.note("\n/quit leaves.")
                continue
            if line.endswith("\\"):
                parts.append(line[:-1])
                continue
            yield "\n".join([*parts, line])
            parts = []

    def _command(self, line: str) -> bool:
        """False: leave."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            for speaker in self.speakers:
                speaker.forget()
            self.note("The conversation is forgotten.")
        elif name == "/system":
            self.be_told(value)
            self.note("A new conversation" + (", with that system message." if value else "."))
        elif name == "/temperature":
            self.sample_at(_temperature(value))
            self.note("; ".join(f"{s.name}: {s.sampling()}" for s in self.speakers))
        elif name == "/help":
            self.note(HELP)
        else:
            raise ConfigError(
                f"{name!r} is no command, and was not sent. /help lists them; a space before the "
                "slash sends the line as it is."
            )
        return True

    def be_told(self, system: str) -> None:
        """All begin anew with this system message, or none of them does."""
        before = [speaker.messages for speaker in self.speakers]
        try:
            for speaker in self.speakers:
                speaker.be_told(system)
        except SrppoError:
            for speaker, messages in zip(self.speakers, before, strict=True):
                speaker.messages = messages
            raise

    def sample_at(self, temperature: float) -> None:
        """All sample at this temperature from the next answer on."""
        for speaker in self.speakers:
            speaker.sample_at(temperature)


def converse(
    directory: str,
    compare: list[str],
    *,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Load the models and talk. `compare` holds NAME=DIR or DIR.

    Raises:
        SrppoError: a model that cannot be loaded, or a system message that one cannot read.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    named = [_named(directory, ""), *(_named(item, "=") for item in compare)]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"two models are called {twice!r}: their answers could not be told apart. "
            f"Write --compare OTHER={named[names.index(twice)][1]}."
        )
    speakers = [Speaker.load(name, path, dtype, device, max_tokens) for name, path in named]
    conversation = Conversation(speakers, seed)
    if temperature is not None:
        conversation.sample_at(temperature)
    if system:
        conversation.be_told(system)
    conversation.run()


def _named(item: str, separator: str) -> tuple[str, str]:
    """Name and directory; without a name, the end of the directory's."""
    name, found, path = item.partition(separator) if separator else ("", "", item)
    if found and name and path:
        return name, path
    return item.rstrip("/").rsplit("/", 1)[-1].removeprefix("srppo:") or item, item


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"temperature {text!r} is not a number from 0 up: nothing has changed.")
    return value


def _table(speakers: list[Speaker], columns: list[Text], remarks: list[str]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in speakers:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Text(speaker.name, style="bold") for speaker in speakers))
    table.add_row(*columns)
    if any(remarks):
        table.add_row(*(Text(remark, style="dim") for remark in remarks))
    return table


def _remark(answer: Answer) -> str:
    """Empty for an answer that ended by itself and says something."""
    if answer.end == "stopped":
        return "(stopped)"
    if answer.end == "length":
        return f"(cut off after {answer.tokens} tokens)"
    return "" if answer.text.strip() else "(an empty answer)"
