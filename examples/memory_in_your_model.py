"""A decoder layer of your own with windowed attention and a memory, trained a few steps and then run token by token.

python examples/memory_in_your_model.py
"""

import torch
from torch import Tensor, nn

from allmem_ops import AllMemConfig, MemoryBranch, swa


class Layer(nn.Module):
    """x + swa(norm(x)) + alpha * Memory(norm(x)), then an MLP."""

    def __init__(self, d_model: int, heads: int, config: AllMemConfig) -> None:
        super().__init__()
        self.heads, self.config = heads, config
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.memory = MemoryBranch(d_model, config)
        self.mlp = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.SiLU(), nn.Linear(2 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attn = self.out(swa(q, k, v, window=self.config.window, sinks=self.config.sinks).flatten(2))
        x = x + self.memory(y, attn)
        return x + self.mlp(self.norm2(x))


def main() -> None:
    torch.manual_seed(0)
    config = AllMemConfig(window=8, sinks=2, chunk_size=16, heads=2, head_dim=16)
    embed, layer, head = nn.Embedding(32, 64), Layer(64, 4, config), nn.Linear(64, 32)
    model = nn.Sequential(embed, layer, head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(32, (4, 24)).repeat(1, 4)  # every token was seen 24 tokens before: outside the window
    for step in range(30):
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    state = layer.memory.initial_state(batch=4)
    y = layer.norm1(embed(text))
    with torch.no_grad():
        steps = torch.cat([layer.memory(token, state=state) for token in y.split(1, dim=1)], 1)
        difference = (steps - layer.memory(y)).abs().max().item()
    print(f"token by token against one pass: max difference {difference:.1e}, state {state.nbytes} bytes")


if __name__ == "__main__":
    main()
