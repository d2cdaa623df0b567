"""The native attention, against PyTorch's own on the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kits.native_kit import OLDER, compiled, on_threads

from engine.attention.masks import MaskRule
from engine.attention.native import NativeAttention, SegmentTable, native_attention
from engine.batch import ForwardBatch, Segment

PLAIN = MaskRule()


@pytest.fixture(scope="module", params=OLDER)
def attention(request: pytest.FixtureRequest, tmp_path_factory) -> NativeAttention:
    cache = tmp_path_factory.mktemp("c")
    names = ("decode_attention", "prompt_attention")
    return NativeAttention(*(compiled(name, request.param, cache) for name in names))


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest):
    yield from on_threads(request.param)


def batch_of(lengths: list[tuple[int, int]]) -> tuple[ForwardBatch, int]:
    """Sequences of (past, new tokens), the first's slots behind the others'; and all slots."""
    num_slots = end = sum(past + count + 2 for past, count in lengths)
    segments: list[Segment] = []
    start = 0
    for number, (past, count) in enumerate(lengths):
        end -= past + count + 2
        segments.append(Segment(start, count, past, end, number))
        start += count
    numbers = torch.arange(start)
    return ForwardBatch(segments, numbers, numbers, numbers, numbers[:0]), num_slots


def numbers_for(
    batch: ForwardBatch, num_slots: int, heads: int, kv_heads: int, key_size: int, value_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch.num_tokens, heads, key_size, generator=generator)
    keys = torch.randn(kv_heads, num_slots, key_size, generator=generator)
    values = torch.randn(kv_heads, num_slots, value_size, generator=generator)
    return query.transpose(0, 1) * 3, keys, values  # strided, as models hand it over


def expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: ForwardBatch,
    rule: MaskRule,
    scale: float,
) -> torch.Tensor:
    """Token by token: [T, H, Dv]."""
    group = len(query) // len(keys)
    rows = []
    for segment in batch.segments:
        for i in range(segment.count):
            position = segment.past + i
            seen = slice(
                segment.first_slot + rule.first_key(position), segment.first_slot + position + 1
            )
            rows.append(
                F.scaled_dot_product_attention(
                    query[:, segment.start + i, None].double(),
                    keys[:, seen].repeat_interleave(group, 0).double(),
                    values[:, seen].repeat_interleave(group, 0).double(),
                    scale=scale,
                )[:, 0]
            )
    return torch.stack(rows)


@pytest.mark.parametrize(
    "rule", [PLAIN, MaskRule(window=1), MaskRule(window=20), MaskRule(chunk=16)], ids=repr
)
@pytest.mark.parametrize("shape", [(8, 4, 64, 64), (3, 3, 20, 20), (4, 1, 24, 7), (1, 1, 1, 1)])
def test_equals_pytorch_s(
    attention: NativeAttention, shape: tuple[int, int, int, int], rule: MaskRule
):
    batch, num_slots = batch_of([(0, 70), (30, 1), (41, 40), (0, 1), (97, 2), (0, 13)])
    query, keys, values = numbers_for(batch, num_slots, *shape)
    found = attention(query, keys, values, SegmentTable.of(batch, rule), rule, 0.3)
    wanted = expected(query, keys, values, batch, rule, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@given(st.data())
def test_any_mix_of_lengths_windows_and_chunks(data: st.DataObject):
    attention = native_attention()
    if attention is None:
        pytest.skip("no C compiler here")
    lengths = st.tuples(st.integers(0, 60), st.integers(1, 50))
    batch, num_slots = batch_of(data.draw(st.lists(lengths, min_size=1, max_size=5)))
    limit = data.draw(st.integers(1, 120))
    rule = data.draw(st.sampled_from([PLAIN, MaskRule(window=limit), MaskRule(chunk=limit)]))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    sizes = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    query, keys, values = numbers_for(batch, num_slots, kv_heads * group, kv_heads, *sizes)
    found = attention(query, keys, values, SegmentTable.of(batch, rule), rule, 0.1)
    wanted = expected(query, keys, values, batch, rule, 0.1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_scores_far_apart_don_t_overflow(attention: NativeAttention, count: int):
    batch, num_slots = batch_of([(30, count)])
    query, keys, values = numbers_for(batch, num_slots, 2, 1, 8, 8)
    found = attention(query * 1e3, keys, values, SegmentTable.of(batch, PLAIN), PLAIN, 1.0)
    for i in range(count):
        best = (keys[0, : 31 + i] @ query[:, i].T).argmax(0)
        torch.testing.assert_close(found[i], values[0, best])


@pytest.mark.parametrize("segment", [(-1, 1, 3, 0), (0, 2, 3, -1), (0, 0, 3, 0), (0, 1, -1, 0)])
def test_a_segment_before_the_tensors_is_refused(segment: tuple[int, int, int, int]):
    batch, _ = batch_of([(3, 2)])
    with pytest.raises(ValueError, match="a segment outside"):
        SegmentTable.of(replace(batch, segments=[Segment(*segment, 0)]), PLAIN)


@pytest.mark.parametrize("count", [1, 2])
def test_a_segment_beyond_the_tensors_is_refused(attention: NativeAttention, count: int):
    batch, num_slots = batch_of([(3, count), (4, 1)])
    query, keys, values = numbers_for(batch, num_slots, 2, 1, 8, 8)
    segments = SegmentTable.of(batch, PLAIN)
    with pytest.raises(ValueError, match="segments outside"):
        attention(query[:, 1:], keys, values, segments, PLAIN, 1.0)
    with pytest.raises(ValueError, match="segments outside"):
        attention(query, keys[:, 3:].contiguous(), values[:, 3:].contiguous(), segments, PLAIN, 1.0)


def test_other_dtypes_and_gaps_are_left_to_pytorch():
    query, keys, values = numbers_for(*batch_of([(39, 1)]), 2, 1, 8, 8)
    assert NativeAttention.takes(query, keys, values)
    assert not NativeAttention.takes(query.bfloat16(), keys.bfloat16(), values.bfloat16())
    assert not NativeAttention.takes(query[..., ::2], keys[..., :4], values)
    assert not NativeAttention.takes(query, keys[:, ::2], values[:, ::2])
