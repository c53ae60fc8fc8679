"""What host and graphs pass each other through pinned memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minisgl.engine.state import RING, Mailbox

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
PAD = np.array([[9], [-1], [0]], np.int32)


@DEVICES
def test_mailbox_gives_each_turn_its_own_words_and_tokens(device: str) -> None:
    """The host is a step ahead of the device throughout, for longer than the slots last."""
    mail = Mailbox(7, PAD, torch.device(device))
    words = torch.zeros(3, 4, dtype=torch.int32, device=device)
    mail.next_words(4)[:, :3] = 100
    for turn in range(101, 101 + 3 * RING):
        tokens, done = mail.tokens(3)
        ahead = mail.next_words(4)
        ahead[:, :3] = turn
        mail.receive(words)
        assert words.tolist() == [[turn - 1] * 3 + [pad] for pad in PAD[:, 0].tolist()]
        mail.send(words[0].long() * 2)
        if done is not None:
            done.record()
            done.synchronize()
        assert tokens.tolist() == [2 * (turn - 1)] * 3


@DEVICES
def test_mailbox_begins_again_after_a_reset(device: str) -> None:
    mail = Mailbox(4, PAD, torch.device(device))
    words = torch.zeros(3, 4, dtype=torch.int32, device=device)
    for _ in range(3):
        mail.receive(words)
    mail.reset(4)
    mail.receive(words)
    assert words.tolist() == PAD.repeat(4, axis=1).tolist(), "requests that aren't there"
    mail.reset()
    mail.next_words(4)[:] = 5
    mail.receive(words)
    assert words.tolist() == [[5] * 4] * 3


@DEVICES
def test_mailbox_keeps_the_turn_of_a_step_that_was_not_launched(device: str) -> None:
    mail = Mailbox(4, PAD, torch.device(device))
    words = torch.zeros(3, 4, dtype=torch.int32, device=device)
    mail.next_words(4)[:] = 5
    mail.next_words(4)[:] = 6
    mail.receive(words)
    mail.send(words[0].long())
    tokens, done = mail.tokens(4)
    if done is not None:
        done.synchronize()
    assert tokens.tolist() == [6] * 4


@pytest.mark.cuda
def test_mailbox_reads_what_the_host_writes_between_replays() -> None:
    mail = Mailbox(4, PAD, torch.device("cuda"))
    words = torch.zeros(3, 4, dtype=torch.int32, device="cuda")

    def work() -> None:
        mail.receive(words)
        mail.send(words[0].long() + 1)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    mail.reset()
    pending = []
    for turn in range(4 * RING):
        mail.next_words(4)[:] = turn
        graph.replay()
        pending.append((turn, *mail.tokens(4)))
        if len(pending) > 1:
            expected, tokens, done = pending.pop(0)
            assert done is not None
            done.synchronize()
            assert tokens.tolist() == [expected + 1] * 4
