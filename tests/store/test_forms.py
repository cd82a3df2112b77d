"""Manifests and markers with a right seal that no run can have: refused by what they say."""

import json
import shutil

import pytest
from command_line import cli
from tiny_runs import make_run

from streamfisher import open_run, verify
from streamfisher.errors import CorruptRunError
from streamfisher.runtime import read_json, write_json
from streamfisher.store import forms


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("forms") / "run.zarr", store_centered=True, gram_per="layer")
    run.build_grams()
    return run.path


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]
MANIFESTS = {
    "centered, or not": lambda m: m["layout"].update(centered=False),
    "an option and the layout": lambda m: m["config"].update(store_centered=False),
    "bits that were rounded away": lambda m: m["layout"].update(bitround=7),
    "another codec": lambda m: m["layout"].update(codec="zstd"),
    "waves without a parameter": lambda m: m["layout"].update(waves=[NAMES[1:]]),
    "a parameter in two waves": lambda m: m["layout"].update(waves=[NAMES, NAMES[:1]]),
    "an empty wave": lambda m: m["layout"].update(waves=[NAMES, []]),
    "waves as a mapping": lambda m: m["layout"].update(waves={"0": NAMES}),
    "a Gram of a parameter that is not there": lambda m: m["layout"].update(grams={"x": [*NAMES, "y"]}),
    "a parameter in no Gram": lambda m: m["layout"].update(grams={"x": NAMES[:2]}),
    "a Gram of nothing": lambda m: m["layout"]["grams"].update(y=[]),
    "a representation of another": lambda m: m["layout"].update(representation={"x": "dense"}),
    "an unknown representation": lambda m: m["layout"].update(representation={NAMES[0]: "sparse"}),
    "patterns that are none": lambda m: m["layout"].update(keep=[7]),
    "no parameters": lambda m: m.update(parameters=[]),
    "a name of no length": lambda m: m["parameters"][0].update(name=""),
    "half of a letter": lambda m: m["parameters"][0].update(name="\ud800"),
    "another size than the probe saw": lambda m: m["parameters"][1].update(shape=[5, 2]),
    "an axis too large": lambda m: m["parameters"][0].update(shape=[2**60]),
    "axes without end": lambda m: m["parameters"][0].update(shape=[2] * 10_000),
    "a probe of something else": lambda m: m["probe"]["parameters"].update({NAMES[0]: 7}),
    "a probe without": lambda m: m["probe"].pop("groups"),
    "versions as a list": lambda m: m.update(versions=["1"]),
    "reasons that are none": lambda m: m.update(excluded={"x": None}),
    "a loss without a name": lambda m: m.update(loss={}),
    "digests that are numbers": lambda m: m["data"].update(chunk_digests=[1, 2, 3]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused(case, run):
    manifest = read_json(run / "manifest.json")
    MANIFESTS[case](manifest)
    write_json(run / "manifest.json", manifest)
    with pytest.raises(CorruptRunError, match=r"manifest\.json"):
        open_run(run)
    assert cli("info", run) == 4


def test_grams_of_other_parameters_than_the_manifest_says_are_refused(run):
    manifest = read_json(run / "manifest.json")
    keys = list(manifest["layout"]["grams"])
    assert len(keys) == 1, "the tiny model has one layer"
    manifest["layout"]["grams"][keys[0]] = NAMES[::-1]
    write_json(run / "manifest.json", manifest)
    with pytest.raises(CorruptRunError, match="of other parameters"):
        open_run(run).spectrum("none")


MARKERS = {
    "rows: a sample of another unit": ("rows-000001", {"skipped": {"0": "x"}}),
    "rows: a sample that is no number": ("rows-000001", {"skipped": {"x": "x"}}),
    "rows: no reason": ("rows-000001", {"skipped": {"9": None}}),
    "rows: checksums as a list": ("rows-000001", {"crc32c": []}),
    "rows: chunks of text": ("rows-000001", {"chunks": {"first.weight": "x"}}),
    "rows: values per sample": ("rows-000001", {"samples": 7}),
    "rows: factors": ("rows-000001", {"factors": [{"start": 0}]}),
    "rows: a wave": ("rows-000001", {"wave": -1}),
    "mean: a part": ("mean-000001", {"crc32c": None}),
    "mean: all": ("mean", {"crc32c": [1]}),
    "fields: names as a list": ("fields", {"crc32c": ["../x"]}),
}


@pytest.mark.parametrize("case", MARKERS)
def test_a_marker_that_no_run_has_is_refused_and_named(case, run):
    name, change = MARKERS[case]
    path = run / "done" / f"{name}.json"
    write_json(path, (read_json(path) if path.exists() else {}) | change)
    problems = verify(open_run(run))
    assert any(path.name in problem.detail for problem in problems), problems


GRAMS = [{"tiles": 0}, {"tiles": 2**60}, {"n_samples": 2**40}, {"n_samples": True}, {"crc32c": "x"}, {"settings": None}]
GRAMS += [{"mean_crc32c": None}, {"files": -1}, {"float32_products": 1}, {"tiles": 8}]


@pytest.mark.parametrize("change", GRAMS, ids=str)
def test_the_marker_of_a_gram_that_no_run_has_is_none(change, run):
    opened = open_run(run)
    (key,) = opened.store.gram_members
    before = opened.spectrum("none").global_.eigenvalues
    path = next((run / "done").glob("gram-*.json"))
    write_json(path, read_json(path) | change)
    assert open_run(run).store.grams.marker(key) == {}
    with pytest.raises(CorruptRunError):
        open_run(run).store.grams.read(key)
    assert verify(open_run(run))[0].what == "gram"
    assert open_run(run).spectrum("none").global_.eigenvalues == pytest.approx(before, rel=1e-12)


def test_keys_of_later_versions_are_left_alone(run):
    for name in ("manifest", "done/rows-000000", "done/mean", "done/mean-000000"):
        path = run / f"{name}.json"
        write_json(path, read_json(path) | {"later": {"a": [1]}})
    assert verify(open_run(run), repair=False) == []


def test_what_is_refused_is_shown_in_a_few_letters():
    with pytest.raises(CorruptRunError) as refused:
        forms.require_form({"crc32c": {"a": ["x" * 10**6]}}, forms.FIELDS, "fields.json")
    assert str(refused.value).startswith("fields.json: crc32c.a is ['xxx") and len(str(refused.value)) < 200


def test_facts_of_a_result_cannot_be_overwritten_by_the_loss(run):
    manifest = read_json(run / "manifest.json")
    manifest["loss"] |= {"n_samples_stored": 3, "model_mode": "train"}
    write_json(run / "manifest.json", manifest)
    facts = open_run(run).spectrum("none").metadata
    assert (facts["n_samples_stored"], facts["model_mode"]) == (24, "eval")
    assert json.dumps(facts)


def test_a_moment_of_other_samples_than_it_says_answers_for_none(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    (path,) = (run.path / "done").glob("moment-second.bias.json")
    write_json(path, read_json(path) | {"count": 7})
    with pytest.raises(CorruptRunError, match="is of 7 samples, and 24 are valid"):
        open_run(run.path).spectrum("parameter", samples=slice(7))
    assert [problem.parameter for problem in verify(open_run(run.path))] == ["second.bias"]
