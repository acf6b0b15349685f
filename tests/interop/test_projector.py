"""TorchJD gets its own weights from this library's solver."""

import pytest

pytest.importorskip("torchjd")

import numpy as np
import torch
from torchjd.aggregation import DualProj, UPGrad, UPGradWeighting
from torchjd.linalg import QuadprogProjector

from interop.projector import JaxProjector

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("aggregator", [UPGrad, DualProj])
def test_torchjd_aggregates_the_same(aggregator, dtype):
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(6, 10, generator=generator, dtype=dtype)
    J -= J.mean(dim=0) / 2
    update = aggregator(projector=JaxProjector())(J)
    expected = aggregator()(J)
    assert update.dtype == dtype
    assert not torch.allclose(update, J.mean(dim=0), rtol=1e-2)
    error = torch.linalg.norm(update - expected) / torch.linalg.norm(expected)
    assert error <= TOLERANCES[dtype]


def test_any_number_of_rows_and_any_strides():
    generator = torch.Generator().manual_seed(1)
    U = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64).mT
    J = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weights = JaxProjector()(U, J @ J.T)
    expected = QuadprogProjector()(U, J @ J.T)
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    # The weights are the caller's own.
    weights += 1


def test_the_default_of_this_library_keeps_the_promise():
    # Two conflicting gradients, one about a thousand times longer than the other.
    J = torch.tensor([[1000.0, 0.0], [-1.0, 1.0]])
    update = UPGradWeighting(projector=JaxProjector())(J @ J.T) @ J
    assert (J @ update).min() < -0.1
    projector = JaxProjector(norm_eps=None, reg_eps=None)
    update = UPGradWeighting(projector=projector)(J @ J.T) @ J
    assert (J @ update).min() >= -1e-3 * torch.linalg.norm(update)


def test_half_precision_is_solved_in_single():
    G = torch.tensor([[17.0, -22], [-22, 38]])
    U = torch.eye(2) / 2
    weights = JaxProjector()(U.bfloat16(), G.bfloat16())
    assert weights.dtype == torch.bfloat16
    expected = JaxProjector()(U, G)
    np.testing.assert_allclose(weights.float(), expected, rtol=1e-2)


def test_nan_repr_and_errors():
    assert JaxProjector()(torch.eye(2), torch.full((2, 2), torch.nan)).isnan().all()
    assert repr(JaxProjector(reg_eps=0.1)) == (
        "JaxProjector(norm_eps=0.0001, reg_eps=0.1)"
    )
    with pytest.raises(ValueError, match=r"`reg_eps`.*-1"):
        JaxProjector(reg_eps=-1)(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"`u`.*\(3,\)"):
        JaxProjector()(torch.ones(3), torch.eye(2))
