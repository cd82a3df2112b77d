"""A stream's rows are those of the ordinary engine, to the bit; what it cannot stream it refuses with the reason."""

import weakref

import pytest
import torch
from stream.stream_models import assert_same_bits, buffers, model_and_batches, ordinary_rows, streamed_rows
from torch import nn

from streamfisher.errors import CapacityError, LossError, StreamError
from streamfisher.gradients import GradientEngine
from streamfisher.models import PerSampleLoss, resolve_loss
from streamfisher.stream import Boundaries, LayerStream
from streamfisher.stream.boundaries import MISSING

SEVEN = ["GPT-2", "Llama", "BERT", "T5", "ALBERT", "ViT", "Mixtral"]


@pytest.mark.parametrize("name", SEVEN)
def test_every_parameter_has_the_bits_of_the_ordinary_pass(name):
    model, batches, loss = model_and_batches(name)
    before = [parameter.requires_grad for parameter in model.parameters()]
    expected = ordinary_rows(model, batches, loss)
    assert {key for _, key in expected} == {name for name, _ in model.named_parameters()}
    assert_same_bits(expected, streamed_rows(model, batches, loss))
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not model.training


@pytest.mark.parametrize("name", ["Whisper", "nn.TransformerEncoder", "Mamba"])
def test_where_gradients_meet_in_another_order_they_agree_to_rounding(name):
    model, batches, loss = model_and_batches(name)
    expected, found = ordinary_rows(model, batches, loss), streamed_rows(model, batches, loss)
    whole = sum(float(rows.double().square().sum()) for rows in expected.values()) ** 0.5
    assert expected.keys() == found.keys()
    for key, rows in expected.items():
        difference = float((rows.double() - found[key].double()).norm())
        assert difference <= 1e-6 * max(float(rows.double().norm()), 1e-2 * whole), key


def test_segments_are_the_layers_between_head_and_tail():
    model, batches, loss = model_and_batches("T5")
    with LayerStream(model, loss) as stream:
        stream.study(batches[0])
        names = [segment.name for segment in stream.segments]
    layers = ["decoder.block.1", "decoder.block.0", "encoder.block.1", "encoder.block.0"]
    assert names == ["tail", *layers, "head"]
    assert "shared.weight" in stream.segments[-1].parameters, "tied: in the pass that replays embedding and head"
    assert stream.segments[0].parameters == ("decoder.final_layer_norm.weight",)


def test_calls_of_a_shared_layer_are_one_segment():
    model, batches, loss = model_and_batches("ALBERT")
    with LayerStream(model, loss) as stream:
        stream.study(batches[0])
        (layers,) = stream.segments[1:-1]
    assert len(layers.calls) == 2
    assert layers.modules == ("albert.encoder.albert_layer_groups.0",)


def test_only_the_parameters_that_are_asked_for_have_rows():
    model, batches, loss = model_and_batches("Llama")
    expected = ordinary_rows(model, batches, loss)
    found = streamed_rows(model, batches, loss, include=("model.layers.1.*", "lm_head.*"))
    assert {name.split(".")[0] for _, name in found} == {"model", "lm_head"}
    assert not any("layers.0" in name or "embed" in name for _, name in found)
    for key, rows in found.items():
        assert torch.equal(rows, expected[key]), key


def test_rows_of_one_part_of_a_probe_are_freed_before_those_of_the_next(monkeypatch):
    model, batches, loss = model_and_batches("Llama")
    made, alive = [], []
    allocate = GradientEngine.allocate

    def counted(engine, *arguments):
        alive.append(sum(reference() is not None for reference in made))
        rows = allocate(engine, *arguments)
        made.extend(weakref.ref(values) for values in rows.values())
        return rows

    monkeypatch.setattr(GradientEngine, "allocate", counted)
    with LayerStream(model, loss, memory=1) as stream:  # a part for each parameter
        stream.study(batches[0])
    assert len(made) > 20
    assert max(alive) == 0


@pytest.mark.parametrize("every", [2, 5])
def test_thinned_boundaries_are_made_again(every):
    model, batches, loss = model_and_batches("T5")
    expected = ordinary_rows(model, batches, loss)
    assert_same_bits(expected, streamed_rows(model, batches, loss, keep_every=every))


def test_boundaries_beyond_the_memory_go_to_files_with_the_same_bits(tmp_path):
    model, batches, loss = model_and_batches("Llama")
    boundaries = Boundaries(tmp_path / "b", memory=5000)
    assert_same_bits(ordinary_rows(model, batches, loss), streamed_rows(model, batches, loss, boundaries=boundaries))
    assert boundaries.bytes_written > 0
    assert boundaries.bytes_in_memory <= 5000


def test_boundaries_without_a_folder_say_how_much_they_had():
    with pytest.raises(CapacityError, match="more than 10 B of memory"):
        Boundaries(memory=10).put(0, "x", torch.zeros(100))


@pytest.mark.parametrize("kind", ["values", "gradients", "both", "deleted"])
def test_a_damaged_boundary_is_made_again(tmp_path, kind):
    model, batches, loss = model_and_batches("GPT-2")
    expected = ordinary_rows(model, batches, loss)
    boundaries = Boundaries(tmp_path / "b", durable=True)
    found = {}
    with LayerStream(model, loss, deterministic=True, boundaries=boundaries) as stream:
        stream.study(batches[0])
        stream.forward(batches)
        for number, segment in enumerate(stream.segments):
            stream.begin(segment, batches)
            if number == 2:
                for file in (tmp_path / "b").rglob("*.bin"):
                    gradient = file.name.startswith("stream_grad")
                    if kind == "both" or (kind == "values") != gradient:
                        _damage(file, delete=kind == "deleted")
            for index, batch in batches.items():
                out = buffers(stream, segment, batch)
                stream.gradients(segment, index, batches, out)
                found |= {(index, name): rows for name, rows in out.items()}
            stream.finish(segment, batches)
    assert_same_bits(expected, found)
    assert kind == "deleted" or boundaries.n_damaged > 0


def _damage(file, delete):
    if delete:
        file.unlink()
        return
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def test_a_truncated_file_is_missing_and_not_zero(tmp_path):
    boundaries = Boundaries(tmp_path, durable=True)
    boundaries.put(3, "x", torch.arange(6.0))
    assert torch.equal(boundaries.get(3, "x"), torch.arange(6.0))
    (file,) = tmp_path.rglob("*.bin")
    file.write_bytes(file.read_bytes()[:-2])
    assert boundaries.get(3, "x") is MISSING


def test_no_changed_bit_of_a_file_goes_unnoticed(tmp_path):
    boundaries = Boundaries(tmp_path, durable=True)
    boundaries.put("unit 3", "x", torch.arange(3.0))
    (file,) = (tmp_path / "batch-unit 3").iterdir()
    intact = file.read_bytes()
    for bit in range(8 * len(intact)):
        data = bytearray(intact)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert boundaries.get("unit 3", "x") is MISSING
    assert boundaries.n_damaged == 8 * len(intact)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (3, 2), (0, 3)])
def test_a_file_gives_back_dtype_shape_and_values(tmp_path, dtype, shape):
    value = (3 * torch.randn(shape)).to(dtype)
    Boundaries(tmp_path, durable=True).put(0, "x", value)
    torch.testing.assert_close(Boundaries(tmp_path, durable=True).get(0, "x"), value, rtol=0, atol=0)


class Stack(nn.Module):
    """Two layers of a kind that a test gives, between an embedding and a head."""

    is_causal = True

    def __init__(self, layer, tied_layer=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(6, 11)
        if tied_layer:
            self.head.weight = self.embed.weight
            self.layers[1].extra = self.embed.weight

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x) + 0.1 * torch.randn_like(x)


class InPlace(Noisy):
    def forward(self, x):
        return self.linear(x.add_(1.0))


class Mixing(Noisy):
    def forward(self, x):
        return self.linear(x) + x.mean(0, keepdim=True)


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        extra = getattr(self, "extra", None)
        return self.linear(x) if extra is None else self.linear(x) + extra[:1]


IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))


def study(model):
    batch = {"input_ids": IDS}
    with LayerStream(model, resolve_loss(model, batch, "causal")) as stream:
        return stream.study(batch)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (Stack(Noisy), StreamError, "layer layers.0 gives another output when it is replayed.*routing is random"),
        (Stack(InPlace), StreamError, "layer layers.0 changes its argument 0 in place"),
        (Stack(Mixing), LossError, "couples samples"),
        (Stack(Extra, tied_layer=True), StreamError, "embed.weight is used within layer layers.1 and by the code"),
        (nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)), StreamError, "calls no member of a ModuleList"),
    ],
    ids=["random", "in place", "mixing", "tied to a layer", "no layers"],
)
def test_what_is_no_stack_is_refused_with_the_reason(model, error, message):
    with pytest.raises(error, match=message):
        study(model)


def test_a_time_first_stack_is_refused():
    model, batches, loss = model_and_batches("nn.TransformerEncoder")
    model.batch_first = False
    with pytest.raises(StreamError, match="its first axis is not the batch"), LayerStream(model, loss) as stream:
        stream.study(batches[0])


def test_an_argument_that_mixes_samples_is_refused():
    model, batches, loss = model_and_batches("BLOOM")
    with (
        pytest.raises(StreamError, match="cannot be replayed for one sample alone"),
        LayerStream(model, loss) as stream,
    ):
        stream.study(batches[0])


def test_a_batch_that_goes_another_way_is_refused():
    class Sometimes(Stack):
        def forward(self, input_ids):
            x = self.layers[0](self.embed(input_ids))
            return self.head(self.layers[1](x) if input_ids.shape[1] == 5 else x)

    model = Sometimes(Extra)
    batches = {0: {"input_ids": IDS}, 1: {"input_ids": IDS[:, :4]}}
    loss = resolve_loss(model, batches[0], "causal")
    with pytest.raises(StreamError, match=r"another way through the model.*called fewer times"):
        streamed_rows(model, batches, loss)


def test_a_scalar_loss_is_refused():
    with pytest.raises(StreamError, match="only a scalar loss"):
        LayerStream(Stack(Extra), PerSampleLoss("model", "model"))
