"""`srppo chat`, used as a person would: in a pseudo-terminal, and through pipes."""

from __future__ import annotations

import io
import subprocess
import sys
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from runs import srppo_command
from srppo.chat.terminal import converse
from srppo.errors import ConfigError
from terminal import Terminal, plain

MINIATURE = "srppo:miniature"
PROMPT = "\n> "


def piped(text, *arguments, errors="strict"):
    """(exit code, standard output, standard error)"""
    text = text.encode() if isinstance(text, str) else text
    stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", errors=errors)
    with mock.patch.object(sys, "stdin", stdin):
        done = srppo_command("chat", *arguments)
    return done.code, done.out, done.err


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that has much to say: greedily it never ends."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.SHAPE, "max_position_embeddings": 100_000}))
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = 0.0
    path = tmp_path_factory.mktemp("endless")
    model.save_pretrained(path)
    tiny.tokenizer(" ".join("abcdefghijklmnopqrstuv")).save_pretrained(path)  # a word an id
    return path


# --- in a terminal --------------------------------------------------------------------------------


def test_a_conversation():
    with Terminal("chat", MINIATURE) as terminal:
        hello = terminal.read_until(PROMPT)
        assert "miniature: srppo:miniature: 347k parameters, float32 on cpu; greedy, up to" in hello
        assert "Ctrl-C ends an answer, /quit the conversation" in hello
        terminal.type("copy : a b")
        said = terminal.read_until(PROMPT)
        assert said == "copy : a b\r\num i think maybe b a a ?\r\n> "
        terminal.type("/temperature 0.5")
        assert "miniature: temperature 0.5\r\n" in terminal.read_until(PROMPT)
        terminal.type("/system be brief")
        assert "error: refused by the chat template" in terminal.read_until(PROMPT)
        terminal.type("/nonsense")
        assert "'/nonsense' is no command, and was not sent" in terminal.read_until(PROMPT)
        terminal.type("/help")
        assert "/temperature T    sample" in terminal.read_until(PROMPT)
        terminal.type("a " * 80)
        assert "there is no room for an answer. /reset forgets it." in terminal.read_until(PROMPT)
        terminal.type("/reset")
        assert "The conversation is forgotten." in terminal.read_until(PROMPT)
        terminal.type("copy : \\")
        terminal.read_until("… ")
        terminal.type("a b")
        terminal.read_until(PROMPT)
        terminal.type("/quit")
        assert terminal.end() == 0


def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_line_and_ctrl_d_the_program(endless):
    with Terminal("chat", endless, "--temperature", 0, "--max-tokens", 90_000) as terminal:
        terminal.read_until(PROMPT)
        terminal.type("a b")
        said = terminal.read_until("\n")
        while len(said.split()) < 40:  # it streams, and would go on
            said += terminal.read_until(" ")
        terminal.press("\x03")
        assert "(stopped)" in terminal.read_until(PROMPT)
        terminal.press("never sent")
        assert "/quit leaves." in terminal.read_until(PROMPT, meanwhile="\x03")
        terminal.type("c")
        terminal.read_until("c\r\n")
        terminal.read_until(" ")
        terminal.press("\x03")
        terminal.read_until(PROMPT)
        terminal.press("\x04")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.everything


def test_two_side_by_side(endless):
    arguments = ["--compare", f"long={endless}", "--temperature", 0, "--max-tokens", 8]
    with Terminal("chat", MINIATURE, *arguments) as terminal:
        hello = terminal.read_until(PROMPT)
        assert "miniature: srppo:miniature: " in hello
        assert f"long: {endless}: " in hello
        terminal.type("copy : a b")
        screen = terminal.read_until(PROMPT)
        head, *lines = screen.rsplit("miniature ", 1)[1].split("\r\n")[:-1]
        assert head.strip() == "long"
        left, right = (
            " ".join(part.strip() for part in column)
            for column in zip(*((line[:50], line[50:]) for line in lines), strict=True)
        )
        assert left.startswith("um i think maybe b a a ?")
        assert right.endswith("(cut off after 8 tokens)")
        terminal.type("/quit")
        assert terminal.end() == 0


# --- through pipes --------------------------------------------------------------------------------


def test_standard_output_holds_the_answers_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-m", "srppo", "chat", MINIATURE],
        input="copy : a b\n\n/reset\ncopy : a b\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == "um i think maybe b a a ?\n" * 2
    assert "347k parameters" in done.stderr
    assert ">" not in done.stderr.replace("<eos>", "")


def test_the_history_is_part_of_the_prompt():
    _, fresh, _ = piped("sort : c a b\n", MINIATURE)
    _, later, _ = piped("copy : a b\nsort : c a b\n", MINIATURE)
    assert later.splitlines()[1] != fresh.splitlines()[0]


def test_equal_models_say_the_same_at_any_temperature():
    arguments = ["--compare", f"twin={MINIATURE}", "--temperature", "1", "--seed", "5"]
    code, out, _ = piped("copy : a b\nreverse : c d\n/quit\nnot read\n", MINIATURE, *arguments)
    assert code == 0
    names, answers = zip(*(line.split(": ", 1) for line in out.splitlines()), strict=True)
    assert names == ("miniature", "twin") * 2
    assert answers[::2] == answers[1::2]


def test_the_first_error_ends_it():
    code, out, err = piped("copy : a b\n/temperature hot\ncopy : a b\n", MINIATURE)
    assert (code, out) == (2, "um i think maybe b a a ?\n")
    assert "error: temperature 'hot' is not a number from 0 up: nothing has changed." in err
    assert "Traceback" not in err


def test_what_a_model_says_does_not_steer_the_terminal(tmp_path):
    """Its vocabulary holds the bell and a sequence that clears the screen."""
    model = tiny.model()
    model.save_pretrained(tmp_path)
    words = tiny.tokenizer("\x07 \x1b[2J c d e f g h")
    words.save_pretrained(tmp_path)
    _, out, _ = piped("c d\n" * 4, tmp_path, "--temperature", "1", "--max-tokens", "12")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "␇" in out or "␛[2J" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere"], ["'./nowhere' does not exist", "Give a directory"]),
        ([MINIATURE, "--compare", "base=./nowhere"], ["'./nowhere' does not exist"]),
        ([MINIATURE, "--compare", MINIATURE], ["two models are called 'miniature'", "OTHER="]),
        ([MINIATURE, "--system", "be brief"], ["refused by the chat template"]),
        ([MINIATURE, "--device", "cuda:77"], ["'cuda:77' cannot be used"]),
    ],
)
def test_bad_input(arguments, words):
    done = srppo_command("chat", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert [word for word in words if word not in done.err] == []


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter where LANG is C
def test_what_is_piped_in_is_utf_8(errors):
    code, _, err = piped(b"copy : a\ncopy : \xff b\n", MINIATURE, errors=errors)
    assert code == 2
    assert "standard input is not UTF-8 (" in err
    assert "iconv -t UTF-8" in err


def test_a_template_that_fails_is_told(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ 1 / 0 }}"
    tokenizer.save_pretrained(tmp_path)
    code, _, err = piped("a\n", tmp_path)
    assert code == 2
    assert "refused by the chat template (division by zero)" in err


def test_a_system_message_is_all_models_or_none_s(tmp_path):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = piped("/system a\n", tmp_path, "--compare", f"other={MINIATURE}")
    assert code == 2
    assert "refused by the chat template" in err


def test_models_need_names_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match=r"called 'x'.*OTHER=srppo:miniature"):
        converse(MINIATURE, [f"x={MINIATURE}", f"x={MINIATURE}"])


def test_colours_are_left_out_as_read():
    assert plain("\x1b[2ma\x1b[0m\x1b[?25l") == "a"
