"""What a run says of its samples, against explicit float64 matrices and spectra of N - 1 samples computed anew."""

import csv
import json

import numpy as np
import pytest
from command_line import cli
from tiny_runs import PATTERNS, forget_last_unit, make_run, rows

import streamfisher as sf
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError, ConfigError, RunError
from streamfisher.influence import clusters_of, leave_one_out, similar_pairs
from streamfisher.reports import samples_text
from streamfisher.results import effective_rank

N = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("samples") / "run.zarr")


def weighted(G, w, center):
    """Return the rows `sqrt(w_i / W) (g_i - m)`, whose second moment is F."""
    G = G - (w @ G) / w.sum() if center else G
    return G * np.sqrt(w / w.sum())[:, None]


def eigenvalues(G):
    return np.linalg.svd(G, compute_uv=False) ** 2


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("chosen", ["all", "weights", "subset"])
@pytest.mark.parametrize("block", ["global", "second", "first.bias"])
def test_leaving_one_out_gives_the_spectrum_of_the_others(run, center, chosen, block):
    w = np.random.default_rng(0).uniform(0.1, 2, N) if chosen == "weights" else np.ones(N)
    places = np.arange(3, 19) if chosen == "subset" else np.arange(N)
    structure = {"global": None, "second": PATTERNS, "first.bias": "parameter"}[block]
    options = {"weights": w} if chosen == "weights" else {"samples": places}
    found = run.samples(block, center=center, block_structure=structure, **options)
    names = [name for name in run.parameters if block == "global" or name.startswith(block)]
    G = rows(run, names)
    assert found.samples.tolist() == places.tolist()
    for place, i in enumerate(places):
        others = places[places != i]
        values = eigenvalues(weighted(G[others], w[others], center))
        np.testing.assert_allclose(found.without.largest_eigenvalue[place], values[0], rtol=1e-12)
        np.testing.assert_allclose(found.without.trace[place], values.sum(), rtol=1e-12)
        np.testing.assert_allclose(found.without.effective_rank[place], effective_rank(values), rtol=1e-9)
    whole = run.spectrum(structure or "none", center, **options).blocks[block].metrics
    assert found.without.whole["effective_rank"] == pytest.approx(whole["effective_rank"], rel=1e-12)
    assert found.without.whole["trace"] == pytest.approx(whole["trace"], rel=1e-12)


def test_leaving_one_out_normalised_by_tokens_divides_by_the_tokens_that_are_left(tmp_path):
    import torch
    from tiny_models import TinyCausal

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 256, (3 + i % 4,), generator=generator)} for i in range(8)]
    run = sf.collect(TinyCausal().double(), data, tmp_path / "r.zarr", config=SpectralConfig(dtype_compute="float64"))
    found = run.samples(normalization="tokens")
    for i in (0, 3):
        others = run.spectrum("none", samples=[j for j in range(8) if j != i], normalization="tokens").global_
        assert found.without.trace[i] == pytest.approx(others.trace, rel=1e-12)
        assert found.without.largest_eigenvalue[i] == pytest.approx(others.eigenvalues[0], rel=1e-12)


def test_one_sample_that_is_everything_leaves_a_rank_of_one_and_nothing_else():
    K = np.diag([1e12, 0.0, 0.0])
    found = leave_one_out(np.eye(3)[:, :1], np.array([1e12]), np.ones(3), K.diagonal())
    np.testing.assert_allclose(found.largest, [0.0, 1e12, 1e12], atol=1e-3)
    assert found.trace.tolist() == [0.0, 1e12, 1e12]
    np.testing.assert_allclose(found.effective_rank, 1.0)


@pytest.mark.parametrize("twin", [0.0, 1e-9, 1e-3])
def test_a_leading_eigenvalue_that_is_double_or_nearly_so_is_moved_exactly(twin):
    rng = np.random.default_rng(1)
    U, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    d = np.sort(np.concatenate([[5.0, 5.0 - twin], rng.uniform(1e-6, 2, 10)]))[::-1]
    K = (U * d) @ U.T
    found = leave_one_out(U, d, np.ones(12), K.diagonal())
    for i in range(12):
        keep = np.arange(12) != i
        np.testing.assert_allclose(found.largest[i], np.linalg.eigvalsh(K[np.ix_(keep, keep)])[-1], rtol=1e-13)


@pytest.mark.parametrize("center", [False, True])
def test_leverage_is_that_of_the_explicit_inverse_in_parameter_space(run, center):
    w = np.random.default_rng(0).uniform(0.1, 2, N)
    G = weighted(rows(run), w, center)
    F = G.T @ G
    dampings = [1e-3, 0.1, 10.0]
    found = run.samples(center=center, weights=w, dampings=dampings)
    for place, damping in enumerate(dampings):
        expected = np.einsum("ip,pq,iq->i", G, np.linalg.inv(F + damping * np.eye(len(F))), G)
        np.testing.assert_allclose(found.leverages[place], expected, rtol=1e-9)
        np.testing.assert_allclose(found.effective_dimensions[place], expected.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.squared_norms * w / w.sum(), np.square(G).sum(axis=1), rtol=1e-10)


def test_leverage_without_damping_is_that_of_the_pseudo_inverse(run):
    G = rows(run, ["first.bias"])
    found = run.samples("first.bias", block_structure="parameter", dampings=[0])
    np.testing.assert_allclose(found.leverages[0], np.diag(G @ np.linalg.pinv(G)), rtol=1e-9)
    assert found.effective_dimensions[0] == 5


def test_loadings_are_eigenvectors_in_sample_space_with_the_largest_entry_positive(run):
    found = run.samples(top=4)
    G = rows(run)
    np.testing.assert_allclose(G @ G.T @ found.loadings / N, found.loadings * found.eigenvalues, atol=1e-12)
    np.testing.assert_allclose(found.shares.sum(axis=0), 1.0)
    assert (found.loadings[np.abs(found.loadings).argmax(axis=0), range(4)] > 0).all()
    first = found.carriers(0, 2)
    assert first[0]["share"] >= first[1]["share"]
    assert first[0]["loss"] == run.losses[first[0]["sample"]]


def test_an_eigenvector_of_one_sample_is_told_from_one_that_is_shared(tmp_path):
    import torch

    torch.manual_seed(0)
    x, labels = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    which = torch.tensor([0] * 7 + [1] + [0] * 4)
    data = {"x": torch.tensor([[1.0], [100.0]], dtype=torch.float64)[which] * x[which], "labels": labels[which]}
    from tiny_models import squares

    config = SpectralConfig(dtype_compute="float64")
    found = sf.collect(
        torch.nn.Linear(4, 2).double(), data, tmp_path / "r.zarr", config=config, loss=squares(1.0)
    ).samples()
    assert found.is_outlier[0]
    assert found.carriers(0, 1)[0]["sample"] == 7
    assert found.participation[0] == pytest.approx(1.0, abs=1e-3)
    assert not found.is_outlier[1]
    assert found.participation[1] == pytest.approx(11.0, abs=0.1)
    assert found.most_moving("trace", 1)[0]["sample"] == 7


def test_duplicates_are_found_as_pairs_and_as_clusters(tmp_path):
    import torch
    from tiny_models import TinyRegression, vectors

    data = vectors(16)
    for copy, of in ((5, 2), (9, 2), (12, 3)):
        for values in data.values():
            values[copy] = values[of]
    found = sf.collect(TinyRegression(), data, tmp_path / "r.zarr").samples(threshold=0.99999)
    assert sorted(map(tuple, found.pairs.tolist())) == [(2, 5), (2, 9), (3, 12), (5, 9)]
    assert [members.tolist() for members in found.clusters] == [[2, 5, 9], [3, 12]]
    np.testing.assert_allclose(found.pair_cosines, 1.0, atol=1e-6)
    assert torch.is_tensor(data["x"])
    fewer = sf.open_run(tmp_path / "r.zarr").samples(threshold=0.99999, most_pairs=1)
    assert (len(fewer.pairs), fewer.n_pairs) == (1, 4)
    assert "4 pairs of gradients have a cosine of 0.99999 or more" in samples_text(fewer)


def test_pairs_and_clusters_over_many_tiles_are_those_of_all_cosines():
    rng = np.random.default_rng(0)
    G = rng.standard_normal((1100, 3))
    K = G @ G.T
    inverse = 1 / np.sqrt(K.diagonal())
    C = K * inverse[:, None] * inverse
    pairs, values, count = similar_pairs(K, 0.999, inverse, 10**6)
    i, j = np.nonzero(np.triu(C, 1) >= 0.999)
    assert count == len(i) > 50
    assert set(map(tuple, pairs.tolist())) == set(zip(i.tolist(), j.tolist(), strict=True))
    assert (np.diff(values) <= 0).all()
    cluster = clusters_of(K, 0.999, inverse)
    assert all(cluster[a] == cluster[b] >= 0 for a, b in pairs.tolist())
    assert set(np.flatnonzero(cluster >= 0).tolist()) == set(pairs.ravel().tolist())
    sizes = [np.sum(cluster == number) for number in range(cluster.max() + 1)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "ask for at least 1 eigenvector"),
        ({"threshold": 0.0}, "must be above 0 and at most 1"),
        ({"dampings": [-1.0]}, "must be finite and not negative"),
        ({"block": "layer_9"}, "no block 'layer_9'"),
    ],
)
def test_options_out_of_range_are_refused(run, options, message):
    with pytest.raises(ConfigError, match=message):
        run.samples(**options)


def test_what_does_not_fit_the_memory_is_refused_in_a_sentence(run):
    with pytest.raises(CapacityError, match=r"those of 24 samples need .* and the budget is"):
        run.samples(config=run.config.replace(memory_budget=20_000), dampings=[0.1])


def test_projected_gradients_are_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr", project=2)
    with pytest.raises(RunError, match="what single samples do cannot be had from them"):
        run.samples()


def test_the_command_says_what_python_says(run, capsys):
    assert cli("samples", run.path, "--top", 3, "--damping", "0.1,1", "--json", "--quiet") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(run.samples(top=3, dampings=[0.1, 1.0]).to_dict(carriers=3)))
    assert cli("samples", run.path, "--block", "other", "--samples", "0:12", "--quiet") == 0
    shown = capsys.readouterr().out
    assert "other: Fisher of 12 samples, 32 parameters" in shown
    assert "Moved most by leaving out one sample: effective rank" in shown


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_numbers_are_exported(run, tmp_path, capsys, suffix):
    path = tmp_path / f"s{suffix}"
    assert cli("samples", run.path, "--top", 2, "--out", path, "--quiet") == 0
    assert f"Written: {path}" in capsys.readouterr().out
    found = run.samples(top=2)
    if suffix == ".csv":
        with path.open() as file:
            table = list(csv.DictReader(file))
        assert [float(row["loading_1"]) for row in table] == found.loadings[:, 0].tolist()
        assert [float(row["trace_without"]) for row in table] == found.without.trace.tolist()
    elif suffix == ".parquet":
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_parquet(path)
        np.testing.assert_array_equal(frame["effective_rank_without"], found.without.effective_rank)
        assert len(pandas.read_parquet(tmp_path / "s.eigenvectors.parquet")) == 2
    else:
        assert json.loads(path.read_text())["block"] == "global"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--damping", "a"], "must be numbers with commas"),
        (["--damping", "-1"], "must be finite and not negative"),
        (["--carriers", "0"], "name at least 1 sample"),
        (["--out", "s.txt"], "the name must end in"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(run, capsys, arguments, message):
    assert cli("samples", run.path, *arguments, "--quiet") == 2
    assert message in capsys.readouterr().err


def test_texts_are_shown_beside_their_samples(run, tmp_path, capsys):
    lines = tmp_path / "texts.txt"
    lines.write_text("".join(f"the text of {i}\n" for i in range(N)))
    found = run.samples(top=1, texts=lines.read_text().splitlines(), samples=slice(4, 20))
    best = found.carriers(0, 1)[0]
    assert best["text"] == f"the text of {best['sample']}"
    assert cli("samples", run.path, "--texts", lines, "--out", tmp_path / "s.csv", "--quiet") == 0
    assert "the text of" in capsys.readouterr().out
    assert "the text of 7" in (tmp_path / "s.csv").read_text()
    assert cli("influence", run.path, "--queries", "0:2", "--damping", "1", "--texts", lines, "--quiet") == 0
    assert "the text of" in capsys.readouterr().out
    lines.write_text("one line\n")
    assert cli("samples", run.path, "--texts", lines, "--quiet") == 2
    assert "1 texts were given and the run has 24 samples" in capsys.readouterr().err
    assert cli("samples", run.path, "--texts", tmp_path / "nowhere", "--quiet") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_unfinished_run_is_refused_unless_part_of_it_is_asked_for(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    whole = run.samples(samples=slice(0, 16))
    forget_last_unit(run)
    with pytest.raises(RunError, match=r"16 of 24 samples|goes on where it stopped"):
        run.samples()
    found = run.samples(partial=True)
    assert found.samples.tolist() == list(range(16))
    assert found.metadata["partial"]
    np.testing.assert_allclose(found.without.trace, whole.without.trace, rtol=1e-12)
    np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=1e-9)


def test_a_sample_that_was_skipped_is_no_sample_of_the_analysis(tmp_path):
    from tiny_models import TinyRegression, vectors

    run = sf.collect(
        TinyRegression(), vectors(12, nan_at=5), tmp_path / "r.zarr", config=SpectralConfig(on_nonfinite="skip")
    )
    found = run.samples()
    assert found.samples.tolist() == [i for i in range(12) if i != 5]
    assert np.isfinite(found.without.effective_rank).all()
    scores = run.influence([4, 5, 6], 0.1, "global")
    assert scores.queries.tolist() == [4, 6]
    assert np.isfinite(scores.total.damped).all()


def test_a_deterministic_run_gives_the_same_bits_twice(tmp_path):
    run = make_run(tmp_path / "run.zarr", use_deterministic=True)
    first, again = (sf.open_run(run.path).samples() for _ in range(2))
    assert first.to_dict() == again.to_dict()
    np.testing.assert_array_equal(first.without.effective_rank, again.without.effective_rank)
