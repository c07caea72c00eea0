"""From the projection of the hidden state to everything that the memory reads."""
