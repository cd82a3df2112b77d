"""Pictures of spectra: what is in them, and that lines are told apart without colours, for 4 layers and for 40."""

import itertools

import numpy as np
import pytest
import torch

import streamfisher as sf
from streamfisher.blocks.structures import assign_blocks
from streamfisher.solving import Eigenproblem, RowPrecision, solve_blocks

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from streamfisher.reports import picture
from streamfisher.reports.figures import eigenvalue_curves
from streamfisher.results.line_styles import depth_of, depth_scale, kind_of, line_styles
from streamfisher.results.panels import draw_eigenvalues

KINDS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")


def llama(layers, structure="layer", n=12, roundoff=2.0**-24):
    """Return a spectrum with the names of a Llama and random gradients."""
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in KINDS]
    names += ["model.norm.weight", "lm_head.weight"]
    generator = np.random.default_rng(0)
    rows = {name: generator.standard_normal((n, 20)) / (1 + (depth_of(name) or 0)) for name in names}
    problem = Eigenproblem(
        dict.fromkeys(names, 20),
        assign_blocks(names, structure),
        sf.SpectralConfig(),
        center=False,
        precision=RowPrecision(torch.float32, roundoff),
        metadata={
            "block_structure": structure,
            "n_samples": n,
            "sample_unit": "sequence",
            "model": {"class": "transformers.LlamaForCausalLM"},
            "loss_reduction": "sum over target tokens of cross-entropy",
        },
        whole=True,
    )
    return solve_blocks(lambda name: rows[name] @ rows[name].T, problem)


def drawn(spectrum):
    figure = Figure(layout="constrained")
    axis = figure.subplots()
    draw_eigenvalues(axis, spectrum)
    return figure, axis


def lightness(colour):
    """Return what is left of a colour in print without colours."""
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def words(axis):
    return " ".join(text.get_text() for text in axis.texts)


def test_depth_is_a_scale_whose_lightness_rises():
    names = [f"layer_{number}" for number in range(40)]
    greys = [lightness(style.colour) for style in line_styles(["embedding", *names]).values()][1:]
    assert all(later > earlier for earlier, later in itertools.pairwise(greys))
    assert greys[-1] < 0.75, "the last layer is seen on white paper"
    assert depth_scale(names).get_clim() == (0, 39)
    assert depth_scale(["layer_3", "embedding"]) is None


def test_what_is_no_layer_differs_by_its_dashes_and_is_the_same_in_every_picture():
    few, many = line_styles(llama(4).blocks), line_styles(llama(40).blocks)
    for styles in (few, many):
        dashes = {name: styles[name].dashes for name in ("embedding", "output", "other", "layer_0")}
        assert len(set(dashes.values())) == 4
    assert all(few[name] == many[name] for name in ("embedding", "output", "other"))
    modules = line_styles(llama(4, "module").blocks)
    assert len({style.dashes for style in modules.values()}) == len(modules) == 5
    own = line_styles([f"group {number}" for number in range(8)])
    assert len({style.dashes for style in own.values()}) == 8


def test_parameters_have_the_colour_of_their_layer_and_the_dashes_of_their_kind():
    styles = line_styles(llama(12, "parameter").blocks)
    query, up = (styles[f"model.layers.7.{kind}.weight"] for kind in KINDS[:2])
    assert query.colour == up.colour != styles["model.layers.8.mlp.up_proj.weight"].colour
    assert query.dashes == styles["model.layers.0.self_attn.q_proj.weight"].dashes != up.dashes
    assert [kind_of(name) for name in ("encoder_layer_3", "layer_3", "lm_head.weight")] == ["encoder", "", "output"]
    stacks = line_styles(["encoder_layer_0", "encoder_layer_1", "decoder_layer_0", "decoder_layer_1"])
    assert stacks["encoder_layer_1"].dashes != stacks["decoder_layer_1"].dashes


def test_few_layers_are_numbered_and_many_have_a_colour_bar():
    figure, axis = drawn(llama(4))
    assert [text.get_text() for text in axis.texts if text.get_text().isdigit()] == ["0", "1", "2", "3"]
    assert len(figure.axes) == 1
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [*llama(4).blocks, "whole model"]
    figure, axis = drawn(llama(40))
    assert [axis.get_ylabel() for axis in figure.axes[1:]] == ["layer"]
    assert [text.get_text() for text in axis.texts if text.get_text().isdigit()] == ["0", "20", "39"]
    named = {text.get_text() for text in axis.get_legend().get_texts()}
    assert named == {"layers", "embedding", "output", "other", "whole model"}
    assert len(axis.get_lines()) > 40


def test_model_units_n_and_noise_floor_are_in_the_picture():
    _, axis = drawn(llama(4))
    assert axis.get_title() == "LlamaForCausalLM: empirical Fisher\nblocks: layer; 12 sequences"
    assert axis.get_xlabel() == "index of the eigenvalue"
    assert axis.get_ylabel() == "eigenvalue, (nats per unit of a parameter)²"
    assert "N = 12" in words(axis)
    assert "noise floors" in words(axis) and "below this picture" in words(axis)
    _, axis = drawn(llama(4, roundoff=2.0**-4))
    assert "noise floors" in words(axis) and "below this picture" not in words(axis)
    assert "all parameters" in drawn(llama(4, "none"))[1].get_title()


def test_picture_and_page_show_the_same(tmp_path):
    spectrum = llama(4)
    in_page = eigenvalue_curves(spectrum, "curves")
    as_file = picture([spectrum], tmp_path / "spectrum.svg").read_text()
    for text in ("LlamaForCausalLM: empirical Fisher", "whole model", "N = 12"):
        assert text in in_page
        assert f"<!-- {text}" in as_file or text in as_file
    again = picture([spectrum], tmp_path / "a.png").read_bytes()
    assert again == picture([spectrum], tmp_path / "b.png").read_bytes()
    assert picture([spectrum, llama(40)], tmp_path / "no-suffix").suffix == ".png"
