"""Rows that leave a batch, on whatever device the batch is."""

import pytest
import torch

from whence.training.left_out_rows import without_rows


def batch_on(device):
    return {
        "rows": torch.tensor([4, 7, 9], device=device),
        "labels": torch.tensor([[1, 2], [3, 4], [5, 6]], device=device),
    }


@pytest.mark.parametrize("keeps_places", [True, False])
@pytest.mark.parametrize("left_out", [{4}, {4, 7, 9}, {5}])
def test_rows_leave_a_batch_that_is_not_on_the_default_device(left_out, keeps_places):
    """The default device stands for the CPU here, and the CPU for a GPU: nothing may be made on the former."""
    batch, expected = batch_on("cpu"), without_rows(batch_on("cpu"), left_out, keeps_places=keeps_places)
    with torch.device("meta"):
        found = without_rows(batch, left_out, keeps_places=keeps_places)
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("keeps_places", [True, False])
@pytest.mark.parametrize("left_out", [{4}, {4, 7, 9}])
def test_rows_leave_a_batch_on_a_gpu(left_out, keeps_places):
    expected = without_rows(batch_on("cpu"), left_out, keeps_places=keeps_places)
    found = without_rows(batch_on("cuda"), left_out, keeps_places=keeps_places)
    assert all(values.is_cuda and values.tolist() == expected[name].tolist() for name, values in found.items())
