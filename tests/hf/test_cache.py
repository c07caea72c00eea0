"""One cache of constant size: steps, segments, batches with padding, packed sequences and `generate` equal one pass."""

import gc
import resource
import sys

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from allmem_ops import swa
from allmem_ops.hf import AllMemCache, convert, memory_parameters, reconfigure
from tests.hf.tiny import FAMILY_NAMES, awaken, tiny_config, tiny_model, tokens

CLOSE = {"atol": 2e-4, "rtol": 0}


def one_pass(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_segments(model, ids, lengths):
    cache, parts = AllMemCache(model, ids.shape[0]), []
    size = cache.nbytes
    for part in ids.split(lengths, 1):
        parts.append(model(part, past_key_values=cache).logits)
        assert cache.nbytes == size
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_token_by_token_equals_one_pass(family):
    model, ids = awaken(convert(tiny_model(family), tiny_config())), tokens(2, 40)
    torch.testing.assert_close(in_segments(model, ids, [1] * 40), one_pass(model, ids), **CLOSE)


@pytest.mark.parametrize("lengths", [[40], [7, 33], [20, 1, 1, 18], [2, 3, 30, 5], [1, 39], [13, 1, 26]])
def test_segments_equal_one_pass(live, lengths):
    ids = tokens(2, 40)
    torch.testing.assert_close(in_segments(live, ids, lengths), one_pass(live, ids), **CLOSE)


def test_segment_longer_than_the_step_form(live):
    ids = tokens(1, 620)
    torch.testing.assert_close(in_segments(live, ids, [300, 20, 300]), one_pass(live, ids), **CLOSE)


@pytest.mark.parametrize("sink_positions", ["clamped", "absolute"])
@pytest.mark.parametrize("lengths", [[60], [10, 50], [30, 1, 29], [1] * 60])
def test_past_the_trained_length(sink_positions, lengths):
    model = awaken(convert(tiny_model(max_position_embeddings=24), tiny_config(sink_positions=sink_positions)))
    ids = tokens(2, 60)
    torch.testing.assert_close(in_segments(model, ids, lengths), one_pass(model, ids), **CLOSE)


def test_clamped_sinks_are_scored_from_the_last_trained_position():
    """Against rotations made from the model's own RoPE, not by turning queries back."""
    trained, ids = 24, tokens(1, 60)
    model = convert(tiny_model(max_position_embeddings=trained), tiny_config())
    attention, seen = model.model.layers[0].self_attn, {}
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(o=args[0]))
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True)
    one_pass(model, ids)
    x, position = seen["x"], torch.arange(60)[None]

    def rotated(projection, heads, at):
        cos, sin = model.model.rotary_emb(x, at)
        y = projection(x).unflatten(-1, (heads, 16))
        first, second = y.chunk(2, -1)
        return y * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]

    q, k = rotated(attention.q_proj, 6, position), rotated(attention.k_proj, 3, position)
    v = attention.v_proj(x).unflatten(-1, (3, 16))
    q_sinks = rotated(attention.q_proj, 6, position.clamp(max=trained - 1))
    expected = swa(q, k, v, window=12, sinks=3, q_sinks=q_sinks, impl="reference").flatten(2)
    torch.testing.assert_close(seen["o"], expected, atol=1e-5, rtol=0)
    absolute = swa(q, k, v, window=12, sinks=3, impl="reference").flatten(2)
    assert (absolute - expected)[:, trained:].abs().max() > 1e-2
    assert (absolute - expected)[:, :trained].abs().max() < 1e-5


def left_padded(rows):
    length = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


@pytest.mark.parametrize("use_cache", [False, True])
def test_left_padding_equals_separate_rows(live, use_cache):
    rows = [tokens(1, n, seed=n)[0] for n in (33, 1, 20)]
    ids, mask = left_padded(rows)
    with torch.no_grad():
        out = live(ids, attention_mask=mask, use_cache=use_cache)
    for i, row in enumerate(rows):
        torch.testing.assert_close(out.logits[i, -len(row) :], one_pass(live, row[None])[0], **CLOSE)
    if use_cache:
        assert out.past_key_values.positions.tolist() == [33, 1, 20]


def test_padded_batch_goes_on_token_by_token_and_by_segment(live):
    rows = [tokens(1, n, seed=n)[0] for n in (33, 5, 20)]
    more = tokens(3, 12, seed=9)
    ids, mask = left_padded(rows)
    cache, outs = AllMemCache(live, 3), []
    with torch.no_grad():
        live(ids, attention_mask=mask, past_key_values=cache)
        for part in more.split([1, 1, 9, 1], 1):
            mask = torch.cat([mask, torch.ones_like(part)], 1)
            outs.append(live(part, attention_mask=mask, past_key_values=cache).logits)
    for i, row in enumerate(rows):
        expected = one_pass(live, torch.cat([row, more[i]])[None])[0, -12:]
        torch.testing.assert_close(torch.cat(outs, 1)[i], expected, **CLOSE)


def test_a_masked_step_leaves_its_row_as_it_was(live):
    ids, cache = tokens(2, 20), AllMemCache(live, 2)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 20] = 0
    with torch.no_grad():
        live(ids, past_key_values=cache)
        before = cache.index_select([0, 1])
        live(tokens(2, 1), attention_mask=mask, past_key_values=cache)
    for old, new in zip(before.layers, cache.layers, strict=True):
        for name, tensor in new.window.tensors().items():
            assert torch.equal(tensor[1], old.window.tensors()[name][1]), name
        for name, tensor in new.memory.memory.tensors().items():
            assert torch.equal(tensor[1], old.memory.memory.tensors()[name][1]), name
        assert torch.equal(new.memory.conv.inputs[1], old.memory.conv.inputs[1])
        assert not torch.equal(new.window.positions[0], old.window.positions[0])


def test_right_padding_and_an_empty_row(live):
    row = tokens(1, 9)[0]
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    ids[0, :9], mask[0, :9] = row, 1
    with torch.no_grad():
        out = live(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[0, :9], one_pass(live, row[None])[0], **CLOSE)
    assert torch.isfinite(out).all()


def test_packed_positions_equal_separate_sequences(live):
    lengths = [9, 1, 25]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = one_pass(live, ids, position_ids=positions)
    expected = torch.cat([one_pass(live, part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got - one_pass(live, ids)).abs().max() > 1e-2
    with torch.no_grad():
        assert live(ids, position_ids=positions).past_key_values is None
    with pytest.raises(ValueError, match="`use_cache` must be False with packed `position_ids`"):
        live(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="`position_ids` must rise by 1 with a cache; got packed sequences"):
        live(ids, position_ids=positions, past_key_values=AllMemCache(live, 1))


def test_a_plain_call_supplies_the_cache(live):
    ids = tokens(2, 20)
    with torch.no_grad():
        out = live(ids)
        assert isinstance(out.past_key_values, AllMemCache)
        assert live(ids, use_cache=False).past_key_values is None
        following = live(tokens(2, 3), past_key_values=out.past_key_values).logits
    torch.testing.assert_close(following, one_pass(live, torch.cat([ids, tokens(2, 3)], 1))[:, -3:], **CLOSE)
    assert live(ids).past_key_values is None  # with gradients on: a training step


def test_a_cache_in_a_training_step_changes_no_gradient(live):
    ids = tokens(1, 30)
    live(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in memory_parameters(live).items()}
    live.zero_grad()
    out = live(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == 30
    for name, p in memory_parameters(live).items():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def greedy(model, row, count):
    for _ in range(count):
        row = torch.cat([row, one_pass(model, row[None])[0, -1:].argmax(-1)])
    return row


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_generate_greedy_equals_full_passes(family):
    model = awaken(convert(tiny_model(family, max_position_embeddings=24), tiny_config()))
    ids = tokens(1, 10)
    out = model.generate(ids, max_new_tokens=25, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert torch.equal(out.sequences[0], greedy(model, ids[0], 25))
    assert isinstance(out.past_key_values, AllMemCache)


def test_generate_with_left_padding_equals_separate(live):
    rows = [tokens(1, n, seed=n)[0] for n in (17, 4)]
    ids, mask = left_padded(rows)
    out = live.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, -10:], greedy(live, row, 10)[-10:])


def test_generate_beams_equal_generation_without_a_cache(live):
    ids = tokens(2, 11)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(live.generate(ids, **options), live.generate(ids, use_cache=False, **options))


def test_generate_samples_several_continuations(live):
    ids = tokens(1, 11)
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3, "pad_token_id": 0}
    torch.manual_seed(3)
    cached = live.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(cached, live.generate(ids, use_cache=False, **options))
    assert cached.shape == (3, 17)


def test_generate_goes_on_from_a_cache(live):
    ids = tokens(1, 20)
    cache = AllMemCache(live, 1)
    with torch.no_grad():
        live(ids[:, :15], past_key_values=cache)
    out = live.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(out[0], greedy(live, ids[0], 6))


class _Recorder(LogitsProcessor):
    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def test_generate_logits_equal_one_pass(live):
    ids, recorder = tokens(2, 10), _Recorder()
    out = live.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, logits_processor=LogitsProcessorList([recorder]))
    torch.testing.assert_close(torch.stack(recorder.scores, 1), one_pass(live, out)[:, 9:-1], **CLOSE)


def test_cache_rows_reset_select_and_repeat(live):
    ids, cache = tokens(2, 20), AllMemCache(live, 2)
    with torch.no_grad():
        live(ids, past_key_values=cache)
        cache.reset([0])
        assert cache.positions.tolist() == [0, 20]
        mask = torch.ones(2, 31, dtype=torch.long)
        got = live(tokens(2, 11, seed=5), attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got[0], one_pass(live, tokens(2, 11, seed=5)[:1])[0], **CLOSE)
    forked = cache.index_select([1])
    forked.batch_repeat_interleave(3)
    assert forked.batch_size == 3
    assert forked.nbytes == 3 * AllMemCache(live, 1).nbytes
    cache.reset()
    torch.testing.assert_close(in_cache(live, cache, ids), one_pass(live, ids), **CLOSE)


@torch.no_grad()
def in_cache(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def row_tensors(cache, row):
    """Every tensor of one sequence, by layer and name."""
    found = {}
    for index, layer in enumerate(cache.layers):
        for part, state in (("window", layer.window), ("memory", layer.memory.memory), ("conv", layer.memory.conv)):
            found |= {f"{index}.{part}.{name}": t[row].clone() for name, t in state.tensors().items()}
    return found


def assert_rows_equal(one, other):
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("segment", "count"), [(1, 601), (7, 601), (512, 601), (4096, 4501)])
def test_the_state_after_segments_is_that_of_one_pass(live, segment, count):
    """Window, sinks, convolution, weights, momentum and open chunk; every length leaves a shorter last one."""
    ids, caches = tokens(1, count), []
    for length in (segment, count):
        caches.append(AllMemCache(live, 1))
        with torch.no_grad():
            for piece in ids.split(length, 1):
                live(piece, past_key_values=caches[-1], logits_to_keep=1)
    for layer in (layer for cache in caches for layer in cache.layers):
        layer.memory.memory = layer.memory.memory.folded()
    first, second = (row_tensors(cache, 0) for cache in caches)
    for name, tensor in first.items():
        if "tail_" not in name:  # what a folded tail held
            torch.testing.assert_close(tensor, second[name], atol=3e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_forks_answer_apart_and_leave_the_original(live):
    ids, questions = tokens(1, 20), tokens(3, 6, seed=8)
    cache = AllMemCache(live, 1)
    in_cache(live, cache, ids)
    before, forks = row_tensors(cache, 0), cache.fork(3)
    got = in_cache(live, forks, questions)
    torch.testing.assert_close(got, one_pass(live, torch.cat([ids.expand(3, -1), questions], 1))[:, -6:], **CLOSE)
    assert_rows_equal(before, row_tensors(cache, 0))
    assert forks.nbytes == 3 * cache.nbytes
    assert cache.clone().get_seq_length() == 20
    with pytest.raises(ValueError, match="`copies` must be at least 1"):
        cache.fork(0)


def test_a_sequence_is_evicted_and_another_admitted(live):
    """Row 1 of three makes room for a longer text that was read alone, past the trained length; then all go on together."""
    model = awaken(convert(tiny_model(max_position_embeddings=24), tiny_config()))
    ids, newcomer, more = tokens(3, 20), tokens(1, 31, seed=6), tokens(3, 5, seed=7)
    cache, alone = AllMemCache(model, 3), AllMemCache(model, 1)
    in_cache(model, cache, ids)
    in_cache(model, alone, newcomer)
    kept = [row_tensors(cache, row) for row in (0, 2)]
    cache.evict(1)
    assert cache.positions.tolist() == [20, 0, 20]
    cache.admit(1, alone)
    assert cache.positions.tolist() == [20, 31, 20]
    assert_rows_equal(row_tensors(alone, 0), row_tensors(cache, 1))
    for before, row in zip(kept, (0, 2), strict=True):
        assert_rows_equal(before, row_tensors(cache, row))
    got = torch.cat([in_cache(model, cache, part) for part in more.split([1, 1, 3], 1)], 1)
    for row, text in enumerate((ids[0], newcomer[0], ids[2])):
        torch.testing.assert_close(got[row], one_pass(model, torch.cat([text, more[row]])[None])[0, -5:], **CLOSE)
    with pytest.raises(ValueError, match=r"`rows` must lie in \[0, 3\)"):
        cache.admit(3, alone)
    with pytest.raises(ValueError, match="`other` must be an AllMemCache"):
        cache.admit(1, DynamicCache())
    with pytest.raises(ValueError, match="must have been made with the model's present AllMemConfig"):
        cache.admit(1, AllMemCache(awaken(convert(tiny_model(), tiny_config(window=5))), 1))


def test_ten_thousand_admissions_leave_no_trace():
    """Same storage, same bytes, same number of Python objects, same memory of the process."""
    model = awaken(convert(tiny_model(num_hidden_layers=1), tiny_config()))
    cache, other = AllMemCache(model, 2), AllMemCache(model, 1)
    in_cache(model, cache, tokens(2, 20))
    in_cache(model, other, tokens(1, 9))
    layer = cache.layers[0]
    places = [t.data_ptr() for t in (*layer.window.tensors().values(), *layer.memory.memory.tensors().values())]
    size, neighbour, marks = cache.nbytes, row_tensors(cache, 0), []
    for cycle in range(10_001):
        cache.evict(1)
        cache.admit(1, other)
        if cycle in (1_000, 10_000):
            gc.collect()
            marks.append((len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    assert cache.nbytes == size
    assert places == [t.data_ptr() for t in (*layer.window.tensors().values(), *layer.memory.memory.tensors().values())]
    assert_rows_equal(neighbour, row_tensors(cache, 0))
    assert_rows_equal(row_tensors(other, 0), row_tensors(cache, 1))
    (objects, peak), (objects_after, peak_after) = marks
    assert objects_after - objects < 50
    unit = 1024 if sys.platform != "darwin" else 1  # Linux counts in KB
    assert (peak_after - peak) * unit < 4 * 2**20


def test_rows_that_a_step_leaves_out_keep_every_bit(live):
    cache = AllMemCache(live, 3)
    in_cache(live, cache, tokens(3, 20))
    before = [row_tensors(cache, row) for row in range(3)]
    active = torch.tensor([True, False, True])
    with torch.no_grad():
        live(tokens(3, 1), past_key_values=cache, allmem_active=active)
    assert cache.positions.tolist() == [21, 20, 21]
    assert_rows_equal(before[1], row_tensors(cache, 1))
    for row in (0, 2):
        assert not torch.equal(before[row]["0.conv.inputs"], row_tensors(cache, row)["0.conv.inputs"])


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("prefill_chunk_size", [None, 5])
def test_generate_writes_nothing_into_sequences_that_have_ended(live, sample, prefill_chunk_size):
    """A sequence ends early in a batch: its state is that of a run alone. Its prompt holds end tokens too, which count as text."""
    ids = tokens(3, 16)
    options = {"max_new_tokens": 14, "do_sample": sample, "pad_token_id": 0}
    options |= {"top_k": 1} if sample else {}  # one token to draw from: the greedy one
    free = live.generate(ids, eos_token_id=[], **options)
    end = free[1, 19].item()
    ids[1, 3] = ids[1, 15] = ids[0, 15] = end
    free = live.generate(ids, **options)
    end_at = [row[16:].tolist().index(end) if end in row[16:] else 14 for row in free]
    if prefill_chunk_size is not None:
        options |= {"prefill_chunk_size": prefill_chunk_size, "past_key_values": AllMemCache(live, 3)}
    out = live.generate(ids, eos_token_id=end, return_dict_in_generate=True, **options)
    stops = max(min(n + 1, 14) for n in end_at)
    assert len(set(end_at)) > 1, "the sequences end at different places"
    cache = out.past_key_values
    assert cache.positions.tolist() == [16 + min(n, stops - 1) for n in end_at]
    for row, n in enumerate(end_at):
        alone = AllMemCache(live, 1)
        text = free[row : row + 1, : 16 + min(n, stops - 1)]
        in_cache(live, alone, text[:, :16])
        for token in text[:, 16:].T[:, None]:
            in_cache(live, alone, token)
        ours, expected = row_tensors(cache, row), row_tensors(alone, 0)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_beams_are_reordered_in_place(live):
    cache = AllMemCache(live, 3)
    in_cache(live, cache, tokens(3, 20))
    before = [row_tensors(cache, row) for row in range(3)]
    place = cache.layers[0].window.ring_k.data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.layers[0].window.ring_k.data_ptr() == place
    for row, source in enumerate((2, 0, 0)):
        assert_rows_equal(before[source], row_tensors(cache, row))
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    assert_rows_equal(before[0], row_tensors(cache, 0))


def test_what_a_constant_cache_cannot_do_is_refused(live):
    ids = tokens(1, 8)
    with pytest.raises(ValueError, match="`past_key_values` must be an AllMemCache"):
        live(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`past_key_values` must be an AllMemCache"):
        live.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="`cache_implementation` must be None"):
        live.generate(ids, cache_implementation="static", max_new_tokens=2, pad_token_id=0)
    for options in ({"assistant_model": tiny_model()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted decoding needs to take tokens back"):
            live.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, **options)
    cache = AllMemCache(live, 1)
    with pytest.raises(ValueError, match="can't be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="`past_key_values` must hold 2 sequences; got 1"):
        live(tokens(2, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="must have 3 layers; got 2"):
        live(ids, past_key_values=AllMemCache(convert(tiny_model(num_hidden_layers=2), tiny_config()), 1))
    reconfigure(live, window=5)
    with pytest.raises(ValueError, match="must have been made with the model's present AllMemConfig"):
        live(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        AllMemCache(live, 0)
    with pytest.raises(ValueError, match="`model` must be a converted model"):
        AllMemCache(tiny_model(), 1)


def test_a_cache_under_gradient_checkpointing_is_refused(live):
    ids = tokens(1, 8)
    live.train()
    live.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert live(ids).past_key_values is None
    with pytest.raises(ValueError, match="`use_cache` must be False with gradient checkpointing"):
        live(ids, use_cache=True)
    with pytest.raises(ValueError, match="`past_key_values` must be None with gradient checkpointing"):
        live(ids, past_key_values=AllMemCache(live, 1))


def test_bad_masks_are_refused(live):
    ids = tokens(2, 8)
    for mask in (torch.ones(2, 7), torch.ones(1, 8), torch.ones(2, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"`attention_mask` must have shape \[2, 8\]"):
            live(ids, attention_mask=mask)
    cache = AllMemCache(live, 2)
    with torch.no_grad():
        live(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"`attention_mask` must have shape \[2, 16\]"):
            live(ids, attention_mask=torch.ones(2, 8), past_key_values=cache)


def test_bytes_are_counted_by_part(live):
    cache = AllMemCache(live, 2)
    window, memory = cache.layers[0].window, cache.layers[0].memory
    assert window.nbytes >= 2 * (12 + 3) * 3 * 16 * 2 * 4
    assert cache.nbytes == 3 * (window.nbytes + memory.memory.nbytes + memory.conv.nbytes)
