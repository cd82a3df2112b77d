"""A model is handed back bit for bit as it came: values, modes, gradients, hooks; also after an error."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, weight_norm

import streamfisher as sf
from streamfisher import verify

BATCH = {"x": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), "labels": torch.arange(7) % 3}
_HOOKS = [
    name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 4, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, None])[0][:, -1])


def mixed():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model[4].weight.grad = torch.ones(3, 6)
    model[0].register_forward_hook(lambda *args: None)
    model[4].weight.register_hook(lambda grad: 2 * grad)
    model[4].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


MODELS = {
    "mixed": mixed,
    "recurrent": Recurrent,
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 3))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 3))),
    "tied": lambda: nn.Sequential(shared := nn.Linear(5, 5), nn.ReLU(), shared, nn.Linear(5, 3)),
}


def fingerprint(model):
    """All that a user could miss: of every module its tensors by identity and bytes, flags, hooks and attributes."""
    found = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
            hooks = [len(getattr(tensor, kind) or ()) for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")]
            found[name, key] = (
                id(tensor),
                tensor.dtype,
                tensor.detach().clone().tolist(),
                tensor.requires_grad,
                grad,
                hooks,
            )
        found[name, "hooks"] = {kind: list(vars(module)[kind]) for kind in _HOOKS if kind in vars(module)}
        found[name, "mode"] = module.training, sorted(vars(module)), type(module), getattr(module, "dropout", None)
    return found


class StopError(Exception):
    pass


def failing(at):
    """Return a loss that raises in its call number `at`."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == at:
            raise StopError
        return cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    return loss


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


@pytest.mark.parametrize("name", MODELS)
def test_after_success_everything_is_as_it_was(name, tmp_path):
    model = build(name)
    before = fingerprint(model)
    config = sf.SpectralConfig(chunk_size=3)
    run = sf.collect(model, BATCH, tmp_path / "run", config=config)
    assert fingerprint(model) == before
    assert verify(run, model=model, samples=BATCH, deep=2) == []
    assert fingerprint(model) == before
    sf.collect(model, BATCH, tmp_path / "run", config=config)
    for mode in ("full", "chunked", "streaming"):
        sf.FisherSpectral(sf.SpectralConfig(storage_mode=mode)).compute_fisher_spectrum(model, BATCH)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["mixed", "recurrent", "weight norm"])
def test_after_an_error_at_any_call_everything_is_as_it_was(name, tmp_path):
    model, failed = build(name), 0
    before = fingerprint(model)
    for at in (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20):
        try:
            sf.collect(model, BATCH, tmp_path / str(at), loss=failing(at), config=sf.SpectralConfig(chunk_size=3))
        except StopError:
            failed += 1
        assert fingerprint(model) == before, at
    assert failed >= 6


def test_a_forward_that_writes_into_its_input_gets_copies(tmp_path):
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(x.mean(-1, keepdim=True)).div_(x.std(-1, keepdim=True)))

    class Plain(nn.Linear):
        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return super().forward(x / x.std(-1, keepdim=True))

    spectra = []
    for kind in (InPlace, Plain):
        torch.manual_seed(0)
        data = {key: value.clone() for key, value in BATCH.items()}
        spectra.append(sf.collect(kind(5, 3), data, tmp_path / kind.__name__).spectrum("none").global_.eigenvalues)
        assert torch.equal(data["x"], BATCH["x"])
    torch.testing.assert_close(torch.tensor(spectra[0]), torch.tensor(spectra[1]))
