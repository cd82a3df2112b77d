"""Every trainable parameter of many model families, against the float64 loop."""

import pytest
import torch
from gradients import model_zoo, zoo_check


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("entry", model_zoo.ZOO, ids=lambda entry: entry.name)
def test_every_parameter_agrees_with_the_loop(entry, dtype, limit):
    outcome = zoo_check.compare(model_zoo.build(entry), entry.batch(5), dtype)
    assert outcome.captured == outcome.trainable
    assert outcome.worst < limit, max(outcome.errors, key=outcome.errors.get)
    assert outcome.guard < outcome.tolerance
    assert outcome.report.coverage_parameters == 1.0
    assert outcome.report.coverage_norm == pytest.approx(1.0)
    assert outcome.report.per_sample == ()
