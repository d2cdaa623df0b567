"""The compiled product, against PyTorch's own on the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kits.native_kit import OLDER, compiled, on_threads

from engine.kernels.panel_product import PanelProduct, panel_product


@pytest.fixture(scope="module", params=OLDER)
def product(request: pytest.FixtureRequest, tmp_path_factory) -> PanelProduct:
    return PanelProduct(compiled("panel_product", request.param, tmp_path_factory.mktemp("c")))


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest):
    yield from on_threads(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 31, 64, 100])
@pytest.mark.parametrize("inputs", [1, 24, 256, 700])
@pytest.mark.usefixtures("threads")
def test_equals_pytorch_s(product: PanelProduct, inputs: int, outputs: int, bias: bool):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    panels = product.lay_out(weight)
    for rows in (0, 1, 2, 13, 14, 15, 57, 300):
        x = torch.randn(1, rows, inputs, generator=generator)
        expected = F.linear(x.double(), weight.double(), added if added is None else added.double())
        found = product(x, panels, added, outputs)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 64, 100])
@pytest.mark.parametrize("inputs", [1, 256, 700])
@pytest.mark.usefixtures("threads")
def test_int8_weights_give_what_their_numbers_give(
    product: PanelProduct, inputs: int, outputs: int
):
    """To the last bit, so how many rows there are matters here no more than there."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand(outputs, generator=generator)
    added = torch.randn(outputs, generator=generator)
    panels, plain = product.lay_out(values), product.lay_out(values * scales[:, None])
    for rows in (0, 1, 2, 13, 14, 15, 57, 300):
        x = torch.randn(rows, inputs, generator=generator)
        found = product(x, panels, added, outputs, scales)
        assert torch.equal(found, product(x, plain, added, outputs))


@given(st.data())
def test_a_row_s_numbers_don_t_depend_on_its_neighbours(data: st.DataObject):
    product = panel_product()
    if product is None:
        pytest.skip("no C compiler here")
    rows, inputs = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 600))
    outputs = data.draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    panels = product.lay_out(torch.randn(outputs, inputs, generator=generator))
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=40))
    whole = product(x, panels, None, outputs)
    assert torch.equal(product(x[chosen], panels, None, outputs), whole[chosen])


def test_rows_with_gaps_are_taken_as_they_are():
    product = panel_product()
    if product is None:
        pytest.skip("no C compiler here")
    x, weight = torch.randn(7, 40), torch.randn(9, 40)
    found = product(x[::2], product.lay_out(weight), None, 9)
    torch.testing.assert_close(found, F.linear(x[::2], weight))
    found = product(x, product.lay_out(weight.T.contiguous().T), None, 9)
    torch.testing.assert_close(found, F.linear(x, weight))


def test_what_doesn_t_fit_is_refused():
    product = panel_product()
    if product is None:
        pytest.skip("no C compiler here")
    panels = product.lay_out(torch.randn(9, 40))
    for x, bias in (
        (torch.randn(3, 39), None),
        (torch.randn(3, 40).double(), None),
        (torch.randn(3, 40), torch.randn(8)),
    ):
        with pytest.raises(ValueError, match=r"no product of|bias of shape"):
            product(x, panels, bias, 9)
    x, values = torch.randn(3, 40), torch.ones(9, 40, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"int8 to 9"):
        product(x, product.lay_out(values), None, 9)
    with pytest.raises(ValueError, match=r"scales of shape \(8,\)"):
        product(x, product.lay_out(values), None, 9, torch.ones(8))
    with pytest.raises(ValueError, match=r"no layout of torch.float16"):
        product.lay_out(values.half())
