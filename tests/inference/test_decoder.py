"""The decode loop: its tokens are those of full passes and of `generate`, captured and not; ended rows are left alone."""

import pytest
import torch

from allmem_ops.hf import AllMemCache, convert, memory_mode
from allmem_ops.inference import Decoder, Sampling
from allmem_ops.inference.packed import PackedStep
from allmem_ops.testing import assert_within_budget
from tests.hf.test_cache import left_padded
from tests.hf.tiny import FAMILY_NAMES, VOCAB, awaken, tiny_config, tiny_model, tokens

CUDA = torch.cuda.is_available()
PACKED = pytest.mark.parametrize("packed", [False, True])


def built(device, family="llama", dtype=torch.float32, **overrides):
    """A converted model past whose trained length of 24 tokens the tests go; memory heads that the kernels take."""
    model = tiny_model(family, max_position_embeddings=24, **overrides).to(dtype)
    return awaken(convert(model, tiny_config(head_dim=16))).to(device)


@torch.no_grad()
def greedy(model, ids, count):
    """The likeliest tokens by one full pass each."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -count:]


@PACKED
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tokens_are_those_of_full_passes(device, family, packed):
    model, ids = built(device, family), tokens(2, 20).to(device)
    decoder = Decoder(model, batch_size=2, eos_token_id=(), packed=packed)
    decoder.read(ids, segment=7)
    assert torch.equal(decoder.generate(20), greedy(model, ids, 20))


@PACKED
def test_a_captured_step_is_the_uncaptured_one(device, packed):
    """2,000 tokens on a GPU, the first 300 of them uncaptured too; elsewhere nothing is captured. One pass: each token is the likeliest."""
    model, ids = built(device), tokens(1, 20).to(device)
    runs = {}
    for graph, count in ((CUDA, 2000 if CUDA else 60), (False, 300 if CUDA else 60)):
        decoder = Decoder(model, eos_token_id=(), packed=packed, graph=graph)
        decoder.read(ids)
        runs[graph] = decoder.generate(count)
    written = runs[CUDA]
    assert torch.equal(written[:, : runs[False].shape[1]], runs[False])
    with torch.no_grad():
        logits = model(torch.cat([ids, written], 1), use_cache=False).logits[:, 19:-1]
    behind = logits.amax(-1) - logits.gather(-1, written[..., None])[..., 0]
    assert behind.max() < 1e-3  # two tokens that rounding may turn round; the logits' spread is 3


@PACKED
@torch.no_grad()
def test_logits_of_a_half_precision_step_are_within_the_budget(device, packed):
    dtype = torch.bfloat16
    ids = tokens(2, 60).to(device)

    def steps(dtype, packed, impl):
        model = built(device, "qwen3", dtype)
        model.model.allmem.config = model.model.allmem.config.replace(impl=impl)
        for layer in model.model.layers:
            layer.self_attn.memory.config = model.model.allmem.config
        decoder = Decoder(model, batch_size=2, eos_token_id=(), packed=packed, graph=False)
        model(ids[:, :30], past_key_values=decoder.cache)
        found = []
        for token in ids[:, 30:].split(1, 1):
            decoder._token.copy_(token)
            found.append(decoder._logits())
        return torch.stack(found, 1)

    exact = built(device, "qwen3").double()
    want = exact(ids, use_cache=False).logits[:, 30:]
    low = steps(dtype, False, "chunk")
    got = steps(dtype, packed, "auto")
    assert_within_budget("logits", got, low, want)
    with pytest.raises(AssertionError):
        assert_within_budget("zeros", torch.zeros_like(got), low, want)


@PACKED
@pytest.mark.parametrize("segment", [3, 100])
def test_left_padding_and_ended_rows(device, packed, segment):
    """Row by row the tokens of a run alone, up to its end token; and an ended row's state is that of the run alone."""
    model = built(device)
    rows = [tokens(1, n, seed=n)[0] for n in (17, 4, 9)]
    ids, mask = left_padded(rows)
    alone = [greedy(model, row[None].to(device), 20)[0].tolist() for row in rows]
    end = alone[1][3]  # the second row ends early
    decoder = Decoder(model, batch_size=3, eos_token_id=end, pad_token_id=0, packed=packed, check_every=4)
    decoder.read(ids.to(device), attention_mask=mask.to(device), segment=segment)
    got = decoder.generate(20).tolist()
    lengths = []
    for row, tokens_alone in zip(got, alone, strict=True):
        n = tokens_alone.index(end) + 1 if end in tokens_alone else 20
        assert row[:n] == tokens_alone[:n]
        assert not any(row[n:])
        lengths.append(n)
    assert lengths[1] == 4 and max(lengths) > 8
    assert len(got[0]) == max(lengths)
    # the end token itself has not been read, as when a run alone stops there
    assert decoder.cache.positions.tolist() == [len(row) + n - 1 for row, n in zip(rows, lengths, strict=True)]
    single = Decoder(model, eos_token_id=end, packed=packed)
    single.read(rows[1][None].to(device))
    single.generate(20)
    for ended, expected in zip(decoder.cache.layers, single.cache.layers, strict=True):
        for ours, theirs in ((ended.window, expected.window), (ended.memory.conv, expected.memory.conv)):
            for name, tensor in ours.tensors().items():
                torch.testing.assert_close(tensor[1], theirs.tensors()[name][0], atol=1e-4, rtol=0, msg=name)
        for name in ("w_gate", "w_up", "w_down", "m_gate", "mu_sum", "count", "position"):
            ours, theirs = (getattr(layer.memory.memory, name) for layer in (ended, expected))
            torch.testing.assert_close(ours[1], theirs[0], atol=1e-4, rtol=0, msg=name)


def test_goes_on_after_an_answer(device):
    """Read, write, read the answer's last token and more, write again: as one text."""
    model, ids, more = built(device), tokens(1, 20).to(device), tokens(1, 9, seed=4).to(device)
    decoder = Decoder(model, eos_token_id=())
    decoder.read(ids)
    first = decoder.generate(10)
    assert decoder.cache.aligned and decoder.cache.get_seq_length() == 29
    decoder.read(torch.cat([first[:, -1:], more], 1))
    assert torch.equal(decoder.generate(10), greedy(model, torch.cat([ids, first, more], 1), 10))


@PACKED
def test_a_newcomer_takes_an_ended_sequences_place(device, packed):
    """While the other one goes on: both write what they would have written alone."""
    model = built(device)
    ids, newcomer = tokens(2, 20).to(device), tokens(1, 13, seed=6).to(device)
    alone, late = greedy(model, ids, 24), greedy(model, newcomer, 12)
    decoder = Decoder(model, batch_size=2, eos_token_id=(), packed=packed, check_every=4)
    decoder.read(ids)
    other = Decoder(model, eos_token_id=())
    with pytest.raises(ValueError, match="`other` must have read a text"):
        decoder.admit(1, other)
    other.read(newcomer)
    blocks, written = [], []
    for block in decoder.stream(24):
        blocks.append(block)
        written.append(block[1])
        if len(blocks) == 2:
            assert torch.equal(torch.cat(written), alone[1, :8])
            decoder.cache.evict(1)
            written = [decoder.admit(1, other)]
    assert torch.equal(torch.cat(blocks, 1)[0], alone[0])
    assert torch.equal(torch.cat(written)[:12], late[0])
    assert decoder.cache.positions.tolist() == [43, 13 + 16]
    assert decoder.cache.get_seq_length() == 43 and not decoder.cache.aligned


@PACKED
def test_sampling_is_that_of_the_seed(device, packed):
    model, ids = built(device), tokens(2, 20).to(device)

    def draw(seed):
        sampling = Sampling(1.0, top_k=20, top_p=0.9)
        decoder = Decoder(model, batch_size=2, eos_token_id=(), sampling=sampling, seed=seed, packed=packed)
        decoder.read(ids)
        return decoder.generate(30)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert len({tuple(row) for row in first.tolist()}) == 2
    assert first.max() < VOCAB


@pytest.mark.parametrize("mode", ["off", "no_writes"])
def test_memory_modes_reach_the_packed_step(device, mode):
    model, ids = built(device), tokens(1, 20).to(device)
    with memory_mode(model, mode):
        decoder = Decoder(model, eos_token_id=(), packed=True)
        decoder.read(ids)
        assert torch.equal(decoder.generate(15), greedy(model, ids, 15))


def test_the_number_of_tokens_and_the_stop_check(device):
    model, ids = built(device), tokens(1, 20).to(device)
    expected = greedy(model, ids, 21)
    for count in (1, 4, 5, 21):
        decoder = Decoder(model, eos_token_id=(), check_every=4)
        decoder.read(ids)
        assert torch.equal(decoder.generate(count), expected[:, :count])
        assert decoder.cache.get_seq_length() == 19 + count
    decoder = Decoder(model, eos_token_id=(), check_every=4)
    decoder.read(ids)
    seen = []
    assert torch.equal(decoder.generate(21, stop=lambda t: seen.append(t.shape[1]) or t.shape[1] >= 8), expected[:, :8])
    assert seen == [4, 8]


def test_reading_reports_progress_and_keeps_the_cache_constant(device):
    decoder, seen = Decoder(built(device), eos_token_id=()), []
    size = decoder.cache.nbytes
    decoder.read(tokens(1, 50), segment=20, on_segment=seen.append)
    decoder.generate(5)
    assert seen == [20, 40, 50]
    assert decoder.cache.nbytes == size


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@PACKED
def test_no_host_synchronisation_in_a_replay(packed):
    """Neither in the graph's replay, nor in the step itself: capture would fail."""
    device = torch.device("cuda")
    decoder = Decoder(built(device), eos_token_id=(1,), packed=packed)
    decoder.read(tokens(1, 20))
    decoder.generate(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            decoder._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_refused(device):
    model = built(device)
    with pytest.raises(ValueError, match="needs a text to go on from"):
        Decoder(model).generate(3)
    with pytest.raises(ValueError, match="`past_key_values` must have been made with the model's present AllMemConfig"):
        Decoder(model, AllMemCache(awaken(convert(tiny_model(), tiny_config(window=5))).to(device)))
    if not CUDA:
        with pytest.raises(ValueError, match="`graph` must be False without a CUDA device"):
            Decoder(model, graph=True)
    with pytest.raises(ValueError, match="`packed` must be a PackedStep of `model`"):
        Decoder(model, packed=PackedStep(built(device)))
    decoder = Decoder(model, packed=PackedStep(model))
    decoder.read(tokens(1, 5))
    decoder.cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="`cache` must hold the 1 sequences that it was given with; got 2"):
        decoder._step()
    decoder = Decoder(model)
    with pytest.raises(ValueError, match=r"`ids` must have at least one token"):
        decoder.read(tokens(1, 0))
    with pytest.raises(ValueError, match=r"`ids` must have shape"):
        decoder.read(tokens(2, 5))
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1"):
        decoder.generate(0)
    with pytest.raises(ValueError, match="`allmem_active` needs a cache"):
        model(tokens(1, 3).to(device), allmem_active=torch.ones(1, dtype=torch.bool, device=device))
