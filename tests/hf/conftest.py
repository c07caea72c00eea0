"""The converted model that most tests here use."""

import pytest

from allmem_ops.hf import convert
from tests.hf.tiny import awaken, tiny_config, tiny_model


@pytest.fixture
def live():
    """A converted Llama whose memory speaks."""
    return awaken(convert(tiny_model(), tiny_config()))
