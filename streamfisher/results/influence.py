"""Frozen results about pairs of gradients: queries against training samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from streamfisher.errors import ConfigError
from streamfisher.results.metrics import json_values

Score = Literal["influence", "inner", "cosine"]


@dataclass(frozen=True)
class BlockInfluence:
    """Queries against training samples in one block, or in all together."""

    inner: np.ndarray  # (Q, n) float64, g_q^T g_i
    damped: np.ndarray  # (m, Q, n) float64, g_q^T (F + lambda I)^-1 g_i at each damping
    dampings: np.ndarray  # (m,) float64, lambda in the units of the eigenvalues; NaN where blocks differ
    query_squared_norms: np.ndarray  # (Q,) float64
    squared_norms: np.ndarray  # (n,) float64
    noise_floor: float  # dampings below it let rounding decide

    @property
    def cosine(self) -> np.ndarray:
        """Return the cosines of the gradients, (Q, n); 0 where one of the two is zero."""
        sizes = np.sqrt(np.outer(self.query_squared_norms, self.squared_norms))
        found: np.ndarray = np.divide(self.inner, sizes, out=np.zeros_like(self.inner), where=sizes > 0)
        return found

    def score(self, score: Score = "influence", damping: int = 0) -> np.ndarray:
        """Return one of the scores, (Q, n).

        Args:
            score: 'influence' (damped), 'inner' or 'cosine'.
            damping: its place among the dampings.

        Raises:
            ConfigError: there is no such score.
        """
        if score == "influence":
            found: np.ndarray = self.damped[damping]
            return found
        if score not in ("inner", "cosine"):
            raise ConfigError(f"score={score!r} is unknown; choose influence, inner or cosine.")
        return self.inner if score == "inner" else self.cosine


@dataclass(frozen=True)
class Influence:
    """How training samples act on queries, by block. A positive score: a step along the sample helps the query."""

    queries: np.ndarray  # (Q,) int64, numbers in the run of the queries
    samples: np.ndarray  # (n,) int64, numbers in the run
    blocks: Mapping[str, BlockInfluence]
    dampings: np.ndarray  # (m,) float64, as they were asked for
    relative: bool  # they are multiples of each block's mean eigenvalue
    fields: Mapping[str, np.ndarray]  # of the training samples: name -> (n,) float64
    query_fields: Mapping[str, np.ndarray]
    texts: tuple[str, ...] | None = None  # what each training sample says, where that was given or stored
    query_texts: tuple[str, ...] | None = None  # what each query says
    centered: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> BlockInfluence:
        """Return the sum over the blocks: whole gradients' inner products, influence by the block-diagonal Fisher."""
        parts = list(self.blocks.values())
        if len(parts) == 1:
            return parts[0]
        same = all(np.array_equal(part.dampings, parts[0].dampings) for part in parts)
        return BlockInfluence(
            inner=np.sum([part.inner for part in parts], axis=0),
            damped=np.sum([part.damped for part in parts], axis=0),
            dampings=parts[0].dampings if same else np.full(len(self.dampings), np.nan),
            query_squared_norms=np.sum([part.query_squared_norms for part in parts], axis=0),
            squared_norms=np.sum([part.squared_norms for part in parts], axis=0),
            noise_floor=max(part.noise_floor for part in parts),
        )

    @property
    def below_floor(self) -> list[str]:
        """Return the blocks in which a damping, not 0, lies below the noise floor."""
        return [
            key for key, part in self.blocks.items() if ((part.dampings > 0) & (part.dampings < part.noise_floor)).any()
        ]

    def top(
        self,
        query: int | None = None,
        count: int = 10,
        *,
        score: Score = "influence",
        damping: int = 0,
        block: str | None = None,
        lowest: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the training samples with the highest scores for a query, as plain values.

        Args:
            query: its place in `queries`; `None` takes the mean score over all of them.
            count: how many samples.
            score: 'influence' (damped), 'inner' or 'cosine'.
            damping: its place among the dampings.
            block: its key; `None` takes the sum over the blocks.
            lowest: those with the lowest scores instead.
        """
        scores = (self.total if block is None else self.blocks[block]).score(score, damping)
        row = scores.mean(axis=0) if query is None else scores[query]
        return self._ranked(row, count, lowest=lowest)

    def _ranked(self, row: np.ndarray, count: int, *, lowest: bool) -> list[dict[str, Any]]:
        places = np.argsort(row if lowest else -row, kind="stable")[:count]
        ranked = []
        for place in map(int, places):
            one: dict[str, Any] = {"sample": int(self.samples[place]), "score": float(row[place])}
            one |= {name: float(values[place]) for name, values in self.fields.items()}
            ranked.append(one | ({} if self.texts is None else {"text": self.texts[place]}))
        return ranked

    def to_dict(self, count: int = 10, score: Score = "influence") -> dict[str, Any]:
        """Return the highest and lowest samples of every query, by the sum over the blocks, as plain JSON values.

        Args:
            count: samples at each end.
            score: by which they are ranked.
        """
        total = self.total
        ranked: list[dict[str, Any]] = []
        for place in range(len(self.dampings) if score == "influence" else 1):
            scores = total.score(score, place)
            of_queries = []
            for row, query in enumerate(self.queries.tolist()):
                ends = {
                    "highest": self._ranked(scores[row], count, lowest=False),
                    "lowest": self._ranked(scores[row], count, lowest=True),
                }
                said = {} if self.query_texts is None else {"text": self.query_texts[row]}
                of_queries.append({"query": query, **said, **ends})
            mean = scores.mean(axis=0)
            ranked.append(
                {
                    "damping": float(self.dampings[place]) if score == "influence" else None,
                    "queries": of_queries,
                    "mean_of_queries": {
                        "highest": self._ranked(mean, count, lowest=False),
                        "lowest": self._ranked(mean, count, lowest=True),
                    },
                }
            )
        content: dict[str, Any] = {
            "n_queries": len(self.queries),
            "n_samples": len(self.samples),
            "score": score,
            "centered": self.centered,
            "relative": self.relative,
            "blocks": {
                key: {"dampings": part.dampings.tolist(), "noise_floor": part.noise_floor}
                for key, part in self.blocks.items()
            },
            "below_noise_floor": self.below_floor,
            "ranked": ranked,
            "metadata": dict(self.metadata),
        }
        found: dict[str, Any] = json_values(content)
        return found
