"""Metrics as attributes, so that an editor completes them and `help` tells of them."""

from __future__ import annotations

from typing import Any


class MetricAttributes:
    """What a block's `metrics` hold, each under its name; see `docs/metrics.md`."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Return all metrics as plain values."""
        raise NotImplementedError

    @property
    def n_eigenvalues(self) -> int:
        """Return how many eigenvalues are listed."""
        return int(self.metrics["n_eigenvalues"])

    @property
    def largest_eigenvalue(self) -> float:
        """Return lambda_1."""
        return float(self.metrics["largest_eigenvalue"])

    @property
    def second_eigenvalue(self) -> float:
        """Return lambda_2; 0 where there is no second."""
        return float(self.metrics["second_eigenvalue"])

    @property
    def smallest_eigenvalue(self) -> float | None:
        """Return the smallest above the noise floor; 0 where none is, `None` where the list is cut."""
        return _number(self.metrics["smallest_eigenvalue"])

    @property
    def spectral_gap(self) -> float:
        """Return lambda_1 - lambda_2."""
        return float(self.metrics["spectral_gap"])

    @property
    def condition_number(self) -> float | None:
        """Return lambda_1 over the smallest eigenvalue above the floor; `None` where the list is cut."""
        return _number(self.metrics["condition_number"])

    @property
    def effective_rank(self) -> float | None:
        """Return exp of the entropy of the eigenvalues above the floor; `None` where the list is cut."""
        return _number(self.metrics["effective_rank"])

    @property
    def numerical_rank(self) -> int | None:
        """Return how many eigenvalues lie above the noise floor; `None` where the list is cut."""
        found = self.metrics["numerical_rank"]
        return None if found is None else int(found)

    @property
    def stable_rank(self) -> float:
        """Return the trace over lambda_1."""
        return float(self.metrics["stable_rank"])

    @property
    def participation_ratio(self) -> float:
        """Return the squared sum of eigenvalues over the sum of their squares."""
        return float(self.metrics["participation_ratio"])

    @property
    def cumulative_variance_1(self) -> float | None:
        """Return the share of the trace in the largest eigenvalue."""
        return _number(self.metrics["cumulative_variance_1"])

    @property
    def cumulative_variance_10(self) -> float | None:
        """Return the share of the trace in the 10 largest; `None` where fewer are listed of more."""
        return _number(self.metrics["cumulative_variance_10"])

    @property
    def cumulative_variance_100(self) -> float | None:
        """Return the share of the trace in the 100 largest; `None` where fewer are listed of more."""
        return _number(self.metrics["cumulative_variance_100"])

    @property
    def power_law_exponent(self) -> float | None:
        """Return alpha of `lambda_k = c k^-alpha`; `None` where fewer than 5 eigenvalues can be fitted."""
        return _number(self.metrics["power_law_exponent"])


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
