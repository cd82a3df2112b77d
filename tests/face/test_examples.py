"""The examples run, and what they claim is so."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_digits_show_nine_outliers_early_and_a_closing_gap(tmp_path):
    pytest.importorskip("sklearn")
    results = load("digits_outliers").main(tmp_path)
    early = [found for found in results if found["epoch"] <= 1]
    late = [found for found in results if found["epoch"] == 40]
    assert all(found["outliers"] == 9 for found in early)
    assert min(found["gap"] for found in early) > 2 > max(found["gap"] for found in late)
    assert all(0.5 < found["mean_gradient_in_top_space"] <= 1 + 1e-6 for found in results)


@pytest.mark.slow
def test_effective_rank_over_training(tmp_path):
    found = load("effective_rank_over_training").main(tmp_path)
    ranks = found.trajectory("effective_rank", "layer_0")
    assert len(ranks) == 4
    assert (ranks > 1).all()
    assert (tmp_path / "spectra.png").is_file()
    assert all(0 <= overlap.mean_squared_cosine <= 1 for overlap in found.overlaps)


@pytest.mark.slow
def test_true_fisher_differs_from_the_empirical_one(tmp_path, capsys):
    found = load("true_fisher").main(tmp_path)
    printed = capsys.readouterr().out
    assert "labels from the data" in printed and "labels from the model" in printed
    traces = found.trajectory("trace", "layer_0")
    assert len(traces) == 2 and traces[0] != pytest.approx(traces[1], rel=1e-3)


@pytest.mark.slow
def test_reanalysis_needs_no_model(tmp_path, monkeypatch, capsys):
    example = load("reanalysis")
    path = example.make(tmp_path)
    monkeypatch.setattr("streamfisher.demo.load_demo_model", None)
    assert example.main(path).global_.metrics["numerical_rank"] == 64
    assert "three leading eigenvectors" in capsys.readouterr().out
