"""`minisgl shell`: a chat in the terminal, with an engine in this process."""

from __future__ import annotations

import argparse
import signal
import sys

from minisgl.cli import options
from minisgl.cli.chat import Chat
from minisgl.cli.report import Report
from minisgl.cli.terminal import Pipe, Screen, Terminal
from minisgl.types import ModelError, RequestError, SamplingParams

HELP = "Chat with a model in the terminal."
HISTORY = "shell_history"  # in the cache folder
COMMANDS = {
    "/reset": "start a new conversation; the system message stays",
    "/system TEXT": "start a new conversation with TEXT as the system message (alone: show it; none: remove it)",
    "/stats": "about the model, the conversation and the cache",
    "/help": "this list",
    "/exit": "leave; so does Ctrl-D",
}
KEYS = {
    "Enter": "sends the message",
    "Alt-Enter": "begins a new line; so does Enter behind a backslash",
    "Ctrl-C": "stops the answer; what was said by then is kept",
    "Up, Down": "earlier messages, those of earlier runs too",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own)")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Chats until /exit, Ctrl-D or the end of standard input. Without a terminal, each line is a message.

    Raises:
        MinisglError: wrong options, no such model; without a terminal also a message that can't be answered.
    """
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    config = options.engine_config(args)
    from minisgl.gguf_file import cache_dir
    from minisgl.llm import LLM

    llm = LLM(**{name: getattr(config, name) for name in options.ENGINE_OPTIONS})
    if llm.text.chat_template is None:
        raise ModelError(
            f"{args.model} has no chat template, so one can't chat with it; "
            f"`minisgl generate --raw --model {args.model} TEXT` continues a text"
        )
    talks = sys.stdin.isatty() and sys.stdout.isatty()
    Shell(Chat(llm, args.model, params, args.system), Screen(cache_dir() / HISTORY) if talks else Pipe()).run()


class Shell:
    """Reads messages and commands, and shows what comes of them."""

    def __init__(self, chat: Chat, terminal: Terminal) -> None:
        self._chat = chat
        self._terminal = terminal

    def run(self) -> None:
        """Until /exit or the end of the input."""
        if not self._terminal.interactive:
            return self._loop()
        self._note(f"{self._chat.model}. /help lists commands and keys; Ctrl-D leaves.")
        # As an exception Ctrl-C may come up anywhere, in a destructor too, where it would be printed and lost.
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self._chat, "stop", True))
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGINT, before)

    def _loop(self) -> None:
        going = True
        while going:
            try:
                line = self._terminal.read()
                self._chat.stop = False
                going = self._handle(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._terminal.interactive:
                    raise
                self._note("Ctrl-D or /exit leaves")

    def _handle(self, line: str) -> bool:
        """Acts on one message or command; False if it was the last."""
        if line.startswith("/"):
            return self._command(*line.split(maxsplit=1))
        if text := line.strip():
            self._ask(text)
        return True

    def _ask(self, text: str) -> None:
        try:
            report = self._chat.ask(text, self._terminal.show, stoppable=self._terminal.interactive)
        except RequestError as error:
            if not self._terminal.interactive:
                raise
            self._note(self._chat.refusal(error))
            return
        if not self._terminal.interactive:
            self._terminal.show("\n")
            return
        if not report.text:
            self._terminal.show("\n")  # behind the ^C that the terminal shows
        if reason := self._chat.ended_because(report):
            self._note(f"[{reason}]")
        if report.last.num_output:
            self._note(_figures(report))

    def _command(self, name: str, text: str = "") -> bool:
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._chat.reset(self._chat.system)
                self._note("a new conversation")
            case "/system":
                self._system(text.strip())
            case "/stats":
                self._note(*self._chat.stats())
            case "/help":
                width = max(map(len, COMMANDS | KEYS))
                self._note(*(f"{name:{width}}  {meaning}" for name, meaning in (COMMANDS | KEYS).items()))
            case _:
                self._note(f"there is no command {name}; /help lists them. To say it to the model, begin with a space")
        return True

    def _system(self, text: str) -> None:
        if text:
            self._chat.reset(None if text == "none" else text)
            self._note("a new conversation, without a system message" if text == "none" else "a new conversation")
        elif self._chat.system is None:
            self._note("there is no system message but what the model's chat template brings")
        else:
            self._note(f"system message: {self._chat.system}")

    def _note(self, *lines: str) -> None:
        for line in lines:
            self._terminal.note(line)


def _figures(report: Report) -> str:
    figures = [f"{report.last.num_output} tokens"]
    if report.first is not None:
        figures.append(f"first after {report.first:.2f} s")
    if report.rate is not None:
        figures.append(f"{report.rate:.1f} tokens/s")
    figures.append(f"{report.last.num_cached} of {report.last.num_prompt} prompt tokens cached")
    return " · ".join(figures)
