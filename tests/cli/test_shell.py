"""The shell as a person has it, in a pseudo-terminal; through a pipe; and its rules one by one."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from pseudo_terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, PseudoTerminal

from minisgl import LLM, SamplingParams
from minisgl.cli import main
from minisgl.cli import shell as shell_module
from minisgl.cli.chat import Chat
from minisgl.cli.shell import COMMANDS, Shell

FRANCE = "What is the capital of France?"
FIGURES = r"\d+ tokens · first after [\d.]+ s · [\d.]+ tokens/s · \d+ of \d+ prompt tokens cached"


def prompted(screen: str) -> bool:
    """Whether the shell waits for a message."""
    return screen.splitlines()[-1:] == [">"]


class Person(PseudoTerminal):
    """Someone who chats."""

    def ask(self, message: str) -> str:
        """Sends a message and waits for the end of the answer; returns what appeared below the message."""
        self.wait(prompted)
        before = len(self.lines())
        self.type(message + ENTER)
        self.wait(lambda screen: prompted(screen) and len(screen.splitlines()) > before)
        return "\n".join(self.lines()[before:-1])


@pytest.fixture
def history_env(child_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {**child_env, "MINISGL_CACHE": str(tmp_path)}


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "minisgl", *options, "--num-pages", "300"]


def tiny(model: Path) -> list[str]:
    return command("shell", "--model", str(model), "--dummy-weights", "--max-tokens", "20")


def test_a_person_chats_stops_an_answer_and_goes_on(
    smollm2: Path, tiny_model: Path, history_env: dict[str, str], tmp_path: Path
) -> None:
    # the same as `minisgl shell --model …`
    person = Person(command("--model", str(smollm2), "--shell", "--temperature", "0"), history_env)
    try:
        answer = person.ask(FRANCE)
        assert answer.startswith("The capital of France is Paris.")
        assert re.fullmatch(FIGURES, answer.splitlines()[-1])
        assert re.search(r"\x1b\[2m" + FIGURES + r"\x1b\[0m", person.raw), "the figures aren't dim"
        line = person.lines().index(f"> {FRANCE}") + 1
        shown = {screen.splitlines()[line] for screen in person.seen if len(screen.splitlines()) > line}
        partial = {text for text in shown if text and "The capital of France is Paris.".startswith(text)}
        assert len(partial) >= 4, f"the answer did not stream: {shown}"

        person.ask("/reset")
        person.type("Tell me a long story" + ALT_ENTER + "about a river.\\" + ENTER + "Now." + ENTER)
        person.wait(lambda screen: len("".join(screen.split("Now.\n")[1:])) > 120)
        person.type(CTRL_C)
        screen = person.wait(prompted)
        assert "> Tell me a long story\n. about a river.\n. Now.\n" in screen
        assert screen.splitlines()[-3] == "[stopped]"
        assert person.process.poll() is None

        stats = person.ask("/stats")
        assert "2 messages" in stats, "the question and the answer that was cut short"
        answer = person.ask("And where does it end?")
        cached, prompt = map(int, re.findall(r"(\d+) of (\d+) prompt tokens cached", answer)[0])
        assert 0 < cached < prompt, "the conversation goes on where it was"

        person.type(CTRL_D)
        assert person.exit_code() == 0
    finally:
        person.close()

    [file] = tmp_path.glob("shell_history")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    _recall_in_a_second_run(tiny_model, history_env)


def _recall_in_a_second_run(tiny_model: Path, env: dict[str, str]) -> None:
    person = Person(tiny(tiny_model), env)
    try:
        person.wait(prompted)
        person.type(UP)
        person.wait_for("> And where does it end?")
        person.type(UP)
        person.wait_for("> /stats")
        person.type(UP)  # the message of three lines; the cursor is in its last one
        screen = person.wait_for("> Tell me a long story")
        assert ". about a river.\n. Now." in screen
        person.type(UP * 4)
        person.wait_for(f"> {FRANCE}")
        person.type(ENTER)
        person.wait(lambda screen: prompted(screen) and " tokens · first after" in screen)
        assert "> /stats" not in person.text()

        person.type("half a message" + CTRL_C)
        person.wait_for("Ctrl-D or /exit leaves")
        assert "no command /nonsense" in person.ask("/nonsense")
        help_text = person.ask("/help")
        assert all(name in help_text for name in COMMANDS)
        person.type("/exit" + ENTER)
        assert person.exit_code() == 0
    finally:
        person.close()


def test_ctrl_c_just_after_enter_breaks_nothing(tiny_model: Path, history_env: dict[str, str]) -> None:
    person = Person(tiny(tiny_model), history_env)
    try:
        person.wait(prompted)
        for milliseconds in range(0, 20, 2):
            person.type("Hi" + ENTER)
            time.sleep(milliseconds / 1000)
            person.process.send_signal(signal.SIGINT)
            person.settle()
        assert " tokens" in person.ask("Still there?")
        assert "Traceback" not in person.text() and "Exception" not in person.text()
    finally:
        person.close()


def test_pipe_each_line_is_a_message(tiny_model: Path, history_env: dict[str, str], tmp_path: Path) -> None:
    lines = b"One\n\n/system Be brief.\nTwo \xff\n/stats\nThree"
    done = subprocess.run(
        [*tiny(tiny_model), "--temperature", "0"], input=lines, env=history_env, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    notes = done.stderr.decode()
    assert "a new conversation\n" in notes and "2 messages" in notes and "answers       2," in notes
    assert done.stdout.decode().count("\n") >= 3
    assert b"\x1b" not in done.stdout
    assert not (tmp_path / "shell_history").exists()


# -- rules ---------------------------------------------------------------------------------------------------------


class FakeTerminal:
    """Reads from a list; KeyboardInterrupt and EOFError may be among the messages."""

    def __init__(self, messages: list[str | type[BaseException]], interactive: bool = True) -> None:
        self.interactive = interactive
        self._messages = deque(messages)
        self.shown, self.notes = "", list[str]()

    def read(self) -> str:
        message = self._messages.popleft() if self._messages else EOFError
        if isinstance(message, str):
            return message
        raise message

    def show(self, text: str) -> None:
        self.shown += text

    def note(self, text: str) -> None:
        self.notes.append(text)


def chat_of(llm: LLM, max_tokens: int | None = 8) -> Chat:
    return Chat(llm, "tiny", SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


def converse(chat: Chat, *messages: str | type[BaseException]) -> FakeTerminal:
    terminal = FakeTerminal(list(messages))
    Shell(chat, terminal).run()
    return terminal


@pytest.fixture(scope="module")
def small_llm(tiny_model: Path) -> Iterator[LLM]:
    yield LLM(str(tiny_model), device="cpu", dummy_weights=True, num_pages=16, max_model_len=120)


def test_conversation_over_the_context_is_told_what_to_do(small_llm: LLM) -> None:
    chat = chat_of(small_llm)
    terminal = converse(chat, "x" * 30, "y" * 30, "z" * 30, "/reset", "x")
    [refusal] = [note for note in terminal.notes if "too long" in note]
    assert re.search(r"has \d+ tokens; .* may have 120\. The message was not kept\. /reset starts", refusal)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["x"]


def test_answer_that_fills_the_context_says_so(small_llm: LLM) -> None:
    chat = chat_of(small_llm, max_tokens=None)
    terminal = converse(chat, "x")
    assert "[the context of 120 tokens is full; /reset starts a new conversation]" in terminal.notes
    assert chat.num_tokens == 120


def test_answer_cut_by_max_tokens_says_so(tiny_llm: LLM) -> None:
    assert "[cut off at --max-tokens 8]" in converse(chat_of(tiny_llm), "x").notes


def test_message_that_is_no_text_is_told_and_not_kept(tiny_llm: LLM) -> None:
    chat = chat_of(tiny_llm)
    terminal = converse(chat, "x", "lone surrogate \ud800")
    assert len(chat.messages) == 2 and "The message was not kept" in terminal.notes[-1]


def test_system_message_is_set_shown_and_removed(tiny_llm: LLM) -> None:
    chat = chat_of(tiny_llm)
    terminal = converse(chat, "/system", "/system Be  brief.", "/system", "x")
    assert terminal.notes[2:4] == ["a new conversation", "system message: Be  brief."]
    assert chat.system == "Be  brief."
    converse(chat, "/system none")
    assert chat.system is None and chat.messages == []


def test_message_with_a_slash_is_sent_behind_a_space(tiny_llm: LLM) -> None:
    chat = chat_of(tiny_llm)
    terminal = converse(chat, "/etc/passwd has what in it?", " /etc/passwd has what in it?")
    assert "there is no command /etc/passwd" in terminal.notes[1]
    assert chat.messages[0]["content"] == "/etc/passwd has what in it?"


def test_ctrl_c_at_the_prompt_tells_how_to_leave(tiny_llm: LLM) -> None:
    terminal = converse(chat_of(tiny_llm), KeyboardInterrupt, "x")
    assert terminal.notes[1] == "Ctrl-D or /exit leaves" and terminal.shown


def _interrupt_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    step, left = llm.engine.step, [nth]

    def interrupted() -> object:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)


def test_ctrl_c_keeps_what_was_answered(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(tiny_llm, max_tokens=500)
    with monkeypatch.context() as patch:
        _interrupt_step(tiny_llm, patch, 12)
        terminal = converse(chat, "x")
    assert "[stopped]" in terminal.notes
    assert chat.messages[1] == {"role": "assistant", "content": terminal.shown}
    assert len(terminal.shown) > 3
    assert tiny_llm.engine.stats().num_running <= 1  # the one that ends with the next step
    converse(chat, "y")
    assert len(chat.messages) == 4


def test_ctrl_c_before_the_first_token_keeps_nothing(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(tiny_llm)
    with monkeypatch.context() as patch:
        _interrupt_step(tiny_llm, patch, 1)
        terminal = converse(chat, "x")
    assert terminal.notes[1:] == ["[stopped]"] and chat.messages == []


def test_ctrl_c_through_a_pipe_ends_the_program(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_step(tiny_llm, monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        Shell(chat_of(tiny_llm), FakeTerminal(["x"], interactive=False)).run()


def test_model_without_a_chat_template_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    assert main(["shell", "--model", str(tmp_path), "--dummy-weights", "--num-pages", "20"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minisgl: error:")]
    assert "no chat template" in line and "generate --raw" in line


@pytest.mark.parametrize(
    "args", ["--model m --shell --seed 3", "--shell --model m --seed 3", "shell --model m --seed 3"]
)
def test_shell_option_means_the_shell_command(args: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(shell_module, "run", parsed.append)
    assert main(args.split()) == 0
    assert (parsed[0].model, parsed[0].command) == ("m", shell_module)
