"""Convolutions of kernel size 1 and activations during a chunk."""

import copy

import pytest
import torch
from torch import nn

from espnet_kv.cache.step import active_step
from espnet_kv.encoder.encoders import KVConformerEncoder
from espnet_kv.encoder.small_inputs import SWISH, ChunkSwish, PointwiseConv1d, replace_for_chunks


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(6, 10, 1),
        SWISH(),
        nn.Conv1d(10, 6, 1, bias=False),
        nn.Conv1d(6, 6, 3, padding=1, groups=6),
        nn.Conv1d(6, 6, 1, groups=2),
        nn.Conv1d(6, 6, 1, stride=2),
    )


def test_parameters_stay_where_they_were(blocks):
    before = dict(blocks.named_parameters())
    replace_for_chunks(blocks)
    after = dict(blocks.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [type(block) for block in blocks] == [
        PointwiseConv1d,
        ChunkSwish,
        PointwiseConv1d,
        nn.Conv1d,
        nn.Conv1d,
        nn.Conv1d,
    ]


def test_whole_utterances_have_the_same_bits(blocks):
    x = torch.randn(2, 6, 9)
    wanted = blocks(x)
    replace_for_chunks(blocks)
    assert torch.equal(blocks(x), wanted)


def test_chunks_have_the_same_values(blocks):
    x = torch.randn(2, 6, 9)
    wanted = blocks(x)
    replace_for_chunks(blocks)
    with active_step(object()):
        torch.testing.assert_close(blocks(x), wanted)


def test_random_numbers_are_not_used(blocks):
    torch.manual_seed(1)
    replace_for_chunks(blocks)
    found = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(1))


def test_the_encoder_uses_them():
    encoder = KVConformerEncoder(20, output_size=16, attention_heads=2, num_blocks=2)
    kinds = [type(module) for module in encoder.modules()]
    assert kinds.count(PointwiseConv1d) == 4
    assert SWISH not in kinds
    copy.deepcopy(encoder)
