"""The compiled attention of single tokens, against PyTorch's own on the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.native_attention import DecodeAttention, decode_attention

SLOTS = 40


@pytest.fixture(scope="module")
def attend() -> DecodeAttention:
    compiled = decode_attention()
    if compiled is None:
        pytest.skip("no C compiler here")
    return compiled


def _tensors(heads: int, kv_heads: int, key_size: int, value_size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(6, heads, key_size).transpose(0, 1)  # strided, as models hand it over
    keys, values = torch.randn(kv_heads, SLOTS, key_size), torch.randn(kv_heads, SLOTS, value_size)
    return [query * 3, keys, values, torch.full((6, heads, value_size), torch.nan)]


@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (3, 3, 20, 20), (4, 1, 24, 7), (1, 1, 1, 1)])
def test_equals_sdpa(attend: DecodeAttention, shape: tuple[int, int, int, int]):
    query, keys, values, out = _tensors(*shape)
    spans = torch.tensor([[5, 0, 1], [0, 3, 20], [2, 0, SLOTS]])
    attend(query, keys, values, out, spans, 0.3)
    group = shape[0] // shape[1]
    for row, first, end in spans.tolist():
        expected = F.scaled_dot_product_attention(
            query[:, row : row + 1],
            keys[:, first:end].repeat_interleave(group, 0),
            values[:, first:end].repeat_interleave(group, 0),
            scale=0.3,
        )
        torch.testing.assert_close(out[row], expected[:, 0], rtol=1e-5, atol=1e-6)
    assert out[[1, 3, 4]].isnan().all()  # rows of no span are left alone


def test_scores_far_apart_don_t_overflow(attend: DecodeAttention):
    query, keys, values, out = _tensors(2, 1, 8, 8)
    attend(query * 1e3, keys, values, out, torch.tensor([[0, 0, SLOTS]]), 1.0)
    best = (keys[0] @ query[:, 0].T).argmax(0)
    torch.testing.assert_close(out[0], values[0, best])


@pytest.mark.parametrize("span", [[6, 0, 1], [-1, 0, 1], [0, -1, 1], [0, 0, SLOTS + 1], [0, 2, 2]])
def test_a_span_outside_is_refused(attend: DecodeAttention, span: list[int]):
    with pytest.raises(ValueError, match="spans outside"):
        attend(*_tensors(2, 1, 8, 8), torch.tensor([span]), 1.0)


def test_other_dtypes_and_gaps_are_left_to_pytorch():
    query, keys, values, _ = _tensors(2, 1, 8, 8)
    assert DecodeAttention.takes(query, keys, values)
    assert not DecodeAttention.takes(query.bfloat16(), keys.bfloat16(), values.bfloat16())
    assert not DecodeAttention.takes(query[..., ::2], keys[..., :4], values)
    assert not DecodeAttention.takes(query, keys[:, ::2], values[:, ::2])
