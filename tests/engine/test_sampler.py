"""The sampler against published test vectors, transformers' own processors, and statistics."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisgl.engine.sampler import RowState, SampledTokens, penalise, sample
from minisgl.engine.state import DeviceRows, Past, RowParams, param_words
from minisgl.kernels.sample.filter import filter_logits
from minisgl.kernels.sample.noise import gumbel_noise, philox
from minisgl.models.sharding import VocabRange
from minisgl.types import Request, SamplingParams

CPU = torch.device("cpu")
VOCAB = 211


class Row:
    """A request's state as the sampler wants it."""

    def __init__(self, request: Request, seed: int) -> None:
        self.state = RowState(request, VocabRange(VOCAB))
        self.request, self.tokens = request, list(request.tokens)
        words = param_words(request, seed if request.params.seed is None else request.params.seed)
        self.words = torch.from_numpy(words)


def draw(logits: torch.Tensor, rows: list[Row], index: list[int]) -> SampledTokens:
    """Samples, and remembers the tokens."""
    state = DeviceRows(len(rows), 1, 0, CPU)
    ids = torch.arange(len(rows))
    state.write_params(ids, torch.stack([r.words for r in rows]))
    penalised = [r for r in rows if r.state.penalised]
    for place, r in enumerate(rows):
        r.request.row, r.request.tokens = place, array("i", r.tokens)
        if r.state.penalised:
            state.keep_tokens(r.request, len(r.tokens) + 3)
    past = state.past(ids, max(len(r.tokens) for r in penalised)) if penalised else None
    params, places = RowParams(state.params[:-1]), torch.tensor(index)
    out = sample(logits, [r.state for r in rows], params, places, index, VocabRange(VOCAB), past)
    for r, token in zip(rows, out.tokens.tolist(), strict=True):
        r.tokens.append(token)
    return out


def penalised(logits: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """`logits` [R, V] after the penalties of rows that remember their tokens."""
    length = max(len(r.tokens) for r in rows)
    tokens = torch.tensor([r.tokens + [3] * (length - len(r.tokens)) for r in rows], dtype=torch.int32)
    words = torch.stack([r.words for r in rows])
    outputs = torch.tensor([len(r.tokens) - r.request.num_prompt for r in rows])
    wide = torch.cat((logits, torch.full((len(rows), 1), float("nan"))), dim=1)
    past = Past(tokens, words[:, 8:11].view(torch.float32))
    penalise(wide, past, RowParams(words), outputs, VocabRange(VOCAB))
    return wide[:, :VOCAB]


def row(prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 0, **params: object) -> Row:
    resolved = SamplingParams(**params).resolve({}, [])
    request = Request("r", array("i", prompt or [1]), resolved)
    request.tokens.extend(output or [])
    return Row(request, seed)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox(torch.tensor(key), *(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in words) == expected


def test_gumbel_noise_depends_on_place_alone() -> None:
    seeds, index = torch.tensor([5, 9, 5]), torch.tensor([0, 3, 7])
    together = gumbel_noise(seeds, index, VOCAB)
    for i in range(3):
        alone = gumbel_noise(seeds[i : i + 1], index[i : i + 1], VOCAB)
        assert torch.equal(together[i], alone[0])
    assert torch.equal(gumbel_noise(seeds, index, 50), together[:, :50])
    assert not torch.equal(together[0], together[2])
    assert torch.isfinite(together).all()


def test_sample_follows_the_softmax() -> None:
    """Frequencies of 40,000 draws within five standard deviations of the probabilities."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    draws, temperature = 40_000, 0.8
    noise = gumbel_noise(torch.full((draws,), 7), torch.arange(draws), 5)
    counts = torch.bincount((logits / temperature + noise).argmax(-1), minlength=5)
    p = (logits / temperature).softmax(-1)
    deviation = (p * (1 - p) * draws).sqrt()
    assert ((counts - p * draws).abs() < 5 * deviation).all()


def test_sample_is_greedy_at_temperature_zero() -> None:
    logits = random_logits(3)
    rows = [row(temperature=0.0), row(temperature=1.0, seed=3), row(temperature=0.0, top_k=5)]
    tokens = draw(logits, rows, [0, 0, 0]).tokens
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def test_sample_doesn_t_depend_on_the_batch() -> None:
    logits = random_logits(4)
    rows = [
        row(temperature=0.9, seed=11),
        row(temperature=0.0),
        row(temperature=1.3, top_k=7, top_p=0.8, seed=5),
        row(temperature=0.7, min_p=0.1, repetition_penalty=1.2, prompt=[3, 4], seed=8),
    ]
    together = draw(logits, rows, [2, 0, 5, 1]).tokens
    again = [
        row(temperature=0.9, seed=11),
        row(temperature=0.0),
        row(temperature=1.3, top_k=7, top_p=0.8, seed=5),
        row(temperature=0.7, min_p=0.1, repetition_penalty=1.2, prompt=[3, 4], seed=8),
    ]
    for i, index in enumerate([2, 0, 5, 1]):
        assert draw(logits[i : i + 1], [again[i]], [index]).tokens[0] == together[i]


def test_sample_prefers_the_requests_own_seed() -> None:
    logits = torch.zeros(1, VOCAB)
    tokens = {int(draw(logits, [row(temperature=1.0, seed=s)], [0]).tokens[0]) for s in range(20)}
    assert len(tokens) > 10


@pytest.mark.parametrize("top_k, top_p, min_p", [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (20, 0.9, 0.02)])
def test_filter_keeps_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(16)
    expected = logits.clone()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    every = torch.ones(16)
    filter_logits(logits, every, (every * top_k).int(), every * top_p, every * min_p)
    assert torch.equal(logits, expected)


def test_filter_treats_rows_apart() -> None:
    logits = random_logits(3)
    ours = logits.clone()
    filter_logits(ours, torch.ones(3), torch.tensor([0, 1, 4], dtype=torch.int32), torch.ones(3), torch.zeros(3))
    assert torch.isfinite(ours).sum(-1).tolist() == [VOCAB, 1, 4]
    assert torch.equal(ours[0], logits[0])


def test_repetition_penalty_equals_transformers() -> None:
    """In one batch with a row that has none and one that is longer."""
    from transformers import RepetitionPenaltyLogitsProcessor

    rows = [
        row([3, 9, 9, 20], [7, 20], repetition_penalty=1.3),
        row([5], [6]),
        row([8, 8, 1, 2, 4], [0, 0, 0, 210], repetition_penalty=0.7),
    ]
    logits = random_logits(3)
    expected = logits.clone()
    for i, factor in ((0, 1.3), (2, 0.7)):
        processor = RepetitionPenaltyLogitsProcessor(factor)
        expected[i] = processor(torch.tensor([rows[i].tokens]), logits[i : i + 1].clone())[0]
    ours = penalised(logits, rows)
    assert torch.equal(ours, expected)
    assert torch.equal(ours[1], logits[1])


def test_frequency_and_presence_penalties_count_the_output_alone() -> None:
    logits = torch.zeros(2, VOCAB)
    rows = [row([4, 4], [7, 7, 8], frequency_penalty=0.5, presence_penalty=0.25), row([9] * 9)]
    ours = penalised(logits, rows)[0]
    assert (ours[4], ours[7], ours[8]) == (0, -1.25, -0.75)
    rows[0].tokens.append(8)
    assert penalised(logits, rows)[0, 8] == -1.25


@given(st.data())
def test_penalties_follow_their_formulas_on_every_token(data: st.DataObject) -> None:
    """As written out over the whole vocabulary, a row at a time."""
    ids, real = st.integers(0, VOCAB - 1), st.floats(-2, 2, width=32)
    rows = [
        row(
            data.draw(st.lists(ids, min_size=1, max_size=9)), data.draw(st.lists(ids, max_size=9)),
            repetition_penalty=data.draw(st.floats(0.25, 4, width=32)), frequency_penalty=data.draw(real),
            presence_penalty=data.draw(real),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]  # fmt: skip
    logits = random_logits(len(rows))
    expected = logits.clone()
    for line, r in zip(expected, rows, strict=True):
        p, known = r.request.params, torch.tensor(r.tokens)
        seen = torch.bincount(known, minlength=VOCAB) > 0
        counts = torch.bincount(known[r.request.num_prompt :], minlength=VOCAB)
        factor = torch.tensor(p.repetition_penalty)
        line.copy_(torch.where(seen, torch.where(line > 0, line / factor, line * factor), line))
        line -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    assert torch.equal(penalised(logits, rows), expected)


def test_penalties_see_tokens_as_they_are_sampled() -> None:
    state = row(temperature=0.0, presence_penalty=2.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 1.5, 1.0
    assert [int(draw(logits, [state], [i]).tokens[0]) for i in range(3)][:2] == [5, 6]


def test_logit_bias_and_min_tokens_change_the_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 3.0
    biased = row(temperature=0.0, logit_bias={8: 50.0, 5: -100.0})
    assert draw(logits, [biased], [0]).tokens[0] == 8
    minimum = row(temperature=0.0, stop_token_ids=(5,), min_tokens=2)
    tokens = [int(draw(logits, [minimum], [i]).tokens[0]) for i in range(3)]
    assert tokens[0] != 5 and tokens[1] != 5 and tokens[2] == 5
    both = [
        row(temperature=0.0),
        row(temperature=0.0, logit_bias={210: 50.0, 5: 100.0}, stop_token_ids=(5,), min_tokens=1),
    ]
    assert [draw(logits.repeat(2, 1), both, [i, i]).tokens.tolist() for i in range(2)] == [[5, 210], [5, 5]]


def test_logprobs_precede_temperature_and_penalties() -> None:
    logits = random_logits(2)
    rows = [row(temperature=0.0), row(temperature=0.5, logit_bias={3: 100.0}, logprobs=True, top_logprobs=4)]
    out = draw(logits, rows, [0, 0])
    reference = logits[1].log_softmax(-1)
    assert out.logprob_rows == [1] and out.tokens[1] == 3
    assert out.logprobs is not None and out.top_ids is not None and out.top_logprobs is not None
    assert torch.allclose(out.logprobs[0], reference[3])
    assert torch.equal(out.top_ids[0], reference.topk(4).indices)
    assert torch.allclose(out.top_logprobs[0], reference.topk(4).values)
