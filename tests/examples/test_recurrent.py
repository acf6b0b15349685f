"""The network is the GRU that torch has, and the program trains it."""

import jax
import numpy as np
import pytest

from tests.examples.running import example, run

program = example("recurrent")


@pytest.mark.slow
def test_is_the_gru_of_torch():
    torch = pytest.importorskip("torch")
    params = program.init(jax.random.key(0))
    rows = jax.random.uniform(jax.random.key(1), (8, 8))
    gru = torch.nn.GRU(8, program.WIDTH)
    given = {"weight_ih_l0": "input", "weight_hh_l0": "recurrent"}
    state = {k: torch.zeros_like(v) for k, v in gru.state_dict().items()}
    state |= {k: torch.tensor(np.array(params[v].T)) for k, v in given.items()}
    gru.load_state_dict(state)  # Its gates are in the same order.
    with torch.no_grad():
        states = gru(torch.tensor(np.array(rows)))[0].numpy()
    expected = states @ np.asarray(params["output"])
    np.testing.assert_allclose(program.logits(params, rows), expected, atol=1e-5)


def test_trains_and_draws(tmp_path):
    accuracy = run(program, tmp_path, "--steps", "20", "--batch-size", "8")
    assert list(accuracy) == ["mean", "upgrad"]
    for after_rows in accuracy.values():
        assert after_rows.shape == (8,)
        assert (0 <= after_rows).all()
        assert (after_rows <= 1).all()
