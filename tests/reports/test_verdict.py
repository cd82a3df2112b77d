"""What the report says in words: each sentence for numbers that are known."""

import dataclasses

import numpy as np
import pytest

from streamfisher.reports.verdict import verdict, verdict_text
from streamfisher.results import BlockSpectrum, Growth, Spectrum


def block(name, values, n=64):
    values = np.array(values, dtype=float)
    return BlockSpectrum(name, values, values.sum(), 1e-9, values > 1e-9, n, 1000)


def spectrum_of(blocks, whole=(8, 1), error=0.3, **facts):
    members = {name: block(name, values) for name, values in blocks.items()}
    union = block("global", sorted((v for member in members.values() for v in member.eigenvalues), reverse=True))
    metadata = {"block_diagonal_error": error, "block_structure": "layer", **facts}
    return Spectrum(members, union, metadata, solved_whole=block("whole_model", whole))


def growth_of(*ranks, first=8):
    sizes = tuple(first << k for k in range(len(ranks)))
    spectra = tuple(Spectrum({}, block("global", np.ones(rank)), {}) for rank in ranks)
    return Growth(sizes, spectra, 0)


def answer(findings, question):
    return next(finding for finding in findings if question in finding.question)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (
            {"embedding": [49], "layer_0": [37], "layer_1": [14]},
            "embedding and layer_0 carry 86% of the trace (49%, 37%).",
        ),
        ({"embedding": [90], "output": [10]}, "embedding carries 90% of the trace."),
        ({f"layer_{k}": [1] for k in range(20)}, "nothing: of 20 blocks the largest, layer_9, has 5% of the trace."),
    ],
)
def test_what_dominates(blocks, expected):
    assert answer(verdict(spectrum_of(blocks)), "dominates").answer == expected


def test_a_gap_is_one_of_the_whole_model():
    apart = answer(verdict(spectrum_of({"a": [1], "b": [1]}, whole=(8, 1, 1))), "gap").answer
    assert (
        apart
        == "the largest eigenvalue of the whole model stands apart: 8, 8 times the second (gap 7), 80% of the trace."
    )
    assert (
        "does not stand apart: 2, 1 times" in answer(verdict(spectrum_of({"a": [1], "b": [1]}, (2, 2))), "gap").answer
    )


def test_ranks_are_of_the_whole_and_of_at_most_n():
    found = answer(verdict(spectrum_of({"a": [1] * 64, "b": [1] * 64}, whole=np.ones(32))), "directions").answer
    assert found == "the effective rank of the whole model is 32.0, 50% of the 64 that it can be at most."


@pytest.mark.parametrize(
    ("error", "begins", "mood"), [(0.05, "yes", "good"), (0.3, "roughly", "fair"), (0.65, "no", "poor")]
)
def test_block_diagonal_or_not(error, begins, mood):
    found = answer(verdict(spectrum_of({"a": [1], "b": [1]}, error=error)), "block-diagonal")
    assert found.answer.startswith(begins) and f"{error:.0%}" in found.answer and found.mood == mood


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((6, 11, 20), "no: the effective rank grew 82% at the last doubling (16 to 32 samples); try 128."),
        ((50, 95, 99), "yes: the effective rank grew 4% at the last doubling (16 to 32 samples)."),
        (
            (50, 90, 99),
            "nearly: the effective rank grew 10% at the last doubling (16 to 32 samples); to be sure, try 64.",
        ),
        ((50, 60), "no: the effective rank grew 20% at the last doubling (8 to 16 samples); try 64."),
    ],
)
def test_is_n_enough(ranks, expected):
    assert answer(verdict(spectrum_of({"a": [1], "b": [1]}), growth_of(*ranks)), "N enough").answer == expected


def test_nothing_is_said_of_what_is_not_known():
    empty = Spectrum({"a": block("a", [])}, block("global", []), {"block_diagonal_error": None})
    assert verdict(empty) == []
    cut = dataclasses.replace(block("global", [3, 2]), truncated=True)
    questions = [finding.question for finding in verdict(Spectrum({"global": cut}, cut, {}))]
    assert "How many directions?" not in questions and "Is N enough?" not in questions


def test_names_act_on_no_terminal():
    found = verdict_text(verdict(spectrum_of({"\x1b]0;bad": [9], "b": [1]})))
    assert "\x1b" not in found and "\\x1b]0;bad carries 90%" in found


def test_growth_that_was_not_solved_near_all_samples_says_nothing_of_them():
    growth = growth_of(3, 5, 40)
    far = dataclasses.replace(growth, sizes=(8, 15, 4000))
    found = answer(verdict(spectrum_of({"a": [1]}), far), "Is N enough?")
    assert (
        found.answer.startswith("not known: growth was only solved up to 15 of 4,000 samples") and found.mood == "fair"
    )
