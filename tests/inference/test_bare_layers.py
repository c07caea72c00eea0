"""The same for a layer of your own: `TokenMixer` steps in a CUDA graph, ended rows, a newcomer in a row's place, a state in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from allmem_ops import AllMemConfig, TokenMixer
from allmem_ops.layers.mixer import TokenMixerState

CUDA = torch.cuda.is_available()


def built(device):
    config = AllMemConfig(window=12, sinks=3, chunk_size=7, head_dim=16, eta_init=0.05)
    mixer = TokenMixer(48, heads=4, heads_kv=2, head_dim=16, config=config, trained_length=20, qk_norm=True, device=device)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return mixer


def flat(state, prefix=""):
    """The tensors of a nested state by path."""
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + name] = value
    return found


@torch.no_grad()
def test_rows_end_and_newcomers_take_their_place(device):
    mixer, x, late = built(device), torch.randn(2, 40, 48, device=device), torch.randn(1, 25, 48, device=device)
    state, alone = mixer.initial_state(2), mixer.initial_state(1)
    mixer(x[:, :30], state=state)
    mixer(late[:, :20], state=alone)
    before = {name: t[1].clone() for name, t in flat(state.state_dict()).items() if t.shape[:1] == (2,)}
    mixer(x[:, 30:31], state=state, active=torch.tensor([True, False], device=device))
    after = flat(state.state_dict())
    assert all(torch.equal(t, after[name][1]) for name, t in before.items())
    state.reset([1])
    state.copy_([1], alone, [0])
    y = [mixer(torch.cat([x[:1, 31 + t : 32 + t], late[:, 20 + t : 21 + t]]), state=state) for t in range(5)]
    expected = mixer(x[:1])[:, 31:36], mixer(late)[:, 20:]
    torch.testing.assert_close(torch.cat(y, 1), torch.cat(expected), atol=2e-4, rtol=0)


@torch.no_grad()
def test_a_state_goes_through_a_file(device, tmp_path):
    mixer, x = built(device), torch.randn(1, 30, 48, device=device)
    state = mixer.initial_state(1)
    mixer(x[:, :25], state=state)
    made = state.state_dict()
    save_file({name: t.contiguous() for name, t in flat(made).items()}, tmp_path / "state")
    tensors = load_file(tmp_path / "state", device=str(device))

    def filled(state, prefix=""):
        new = {}
        for name, value in state.items():
            nested = filled(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            new[name] = tensors[prefix + name] if isinstance(value, torch.Tensor) else nested
        return new

    again = TokenMixerState.from_state_dict(filled(made))
    assert torch.equal(mixer(x[:, 25:], state=again), mixer(x[:, 25:], state=state))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@torch.no_grad()
def test_steps_in_a_graph(device):
    mixer, x = built(device), torch.randn(2, 60, 48, device=device)
    state, captured = (mixer.initial_state(2) for _ in range(2))
    for s in (state, captured):
        mixer(x[:, :30], state=s)
    slot, active = x[:, 30:31].clone(), torch.zeros(2, dtype=torch.bool, device=device)
    mixer(slot, state=captured, active=active)  # compiles; no row takes it in
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mixer(slot, state=captured, active=active)
    active.fill_(True)
    for t in range(30, 60):
        slot.copy_(x[:, t : t + 1])
        graph.replay()
        assert torch.equal(y, mixer(x[:, t : t + 1], state=state))
