"""Weights of a segment in memory for as long as it is needed.

`Resident` serves a model whose weights are all in memory. `Checkpoint` serves a skeleton: a model whose parameters are
on the meta device and are read from safetensors files, one segment at a time, while a thread reads the next.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from streamfisher.errors import ModelError

#: The name under which `held` knows the code around the layers.
AROUND = ""


class Resident:
    """All weights are in memory."""

    def bind(self, layers: Sequence[str]) -> None:
        """Learn which modules are layers."""

    @contextlib.contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Do nothing."""
        yield

    def prefetch(self, *names: str) -> None:
        """Do nothing."""

    def within_budget(self, layers: Sequence[str]) -> int:
        """Return the bytes of weights that a memory budget has to have room for: none, the model is beside it."""
        return 0


class Checkpoint(Resident):
    """Reads the weights of a skeleton's modules when they are needed.

    Outside of `held`, each module reads its own weights whenever it is called, so that the skeleton can be used like
    any other model, slowly.

    Args:
        model: its parameters are on the meta device and have the dtype that weights are cast to; tied ones are one
            object.
        folder: of safetensors files, with an index if there are several.
        device: where they are put.

    Raises:
        ModelError: a tensor is missing or has another shape than the model's parameter.
    """

    def __init__(self, model: nn.Module, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.model, self.device = model, torch.device(device)
        self.bytes_read = 0
        self._files = tensor_files(Path(folder))
        self._stored = _stored_names(model, self._files, Path(folder))
        self._layers: tuple[str, ...] = ()
        self._held: dict[str, int] = {}
        self._next: tuple[tuple[str, ...], Future[dict[str, Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._attach()

    def bind(self, layers: Sequence[str]) -> None:
        """Learn which modules are layers."""
        self._layers = tuple(layers)
        self._members = {
            AROUND: [n for n, _ in _parameters(self.model) if not any(n.startswith(f"{x}.") for x in layers)],
            **{layer: [n for n, _ in _parameters(self.model) if n.startswith(f"{layer}.")] for layer in layers},
        }

    @contextlib.contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Have the weights of these layers (or of the code around them) in memory inside."""
        new = tuple(name for name in names if not self._held.get(name))
        for name in names:
            self._held[name] = self._held.get(name, 0) + 1
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        hooks: list[tuple[Any, Any, Any]] = []  # Accelerate keeps the forward and its hook on the module
        try:
            tensors = self._take(new) if new else {}
            parameters: dict[int, nn.Parameter] = {}
            for name, tensor in tensors.items():
                owner, _, attribute = name.rpartition(".")
                module = self._owner[owner]
                empty = module._parameters[attribute]
                if id(empty) not in parameters:
                    parameters[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
                before.append((module, attribute, empty))
                module._parameters[attribute] = parameters[id(empty)]
            held: Any
            for held in {id(m): m for m, _, _ in before}.values():
                hooks.append((held, held._hf_hook, held.forward))
                held.forward = held._old_forward
                del held._hf_hook
            yield
        finally:
            for held, hook, forward in hooks:
                held._hf_hook, held.forward = hook, forward
            for module, attribute, empty in before:
                module._parameters[attribute] = empty
            for name in names:
                self._held[name] -= 1

    def prefetch(self, *names: str) -> None:
        """Begin to read these weights, which the next `held` of the same names takes."""
        names = tuple(name for name in names if not self._held.get(name))
        if names and (self._next is None or self._next[0] != names):
            self._forget_next()
            self._next = names, self._thread.submit(self._read, names)

    def within_budget(self, layers: Sequence[str]) -> int:
        """Return the most bytes of weights in memory at a time: a layer, the next one, and the code around them."""
        sizes = dict.fromkeys((AROUND, *layers), 0)
        for name, parameter in self.model.named_parameters():
            holder = next((layer for layer in layers if name.startswith(f"{layer}.")), AROUND)
            sizes[holder] += parameter.nbytes
        return sizes.pop(AROUND) + sum(sorted(sizes.values())[-2:])

    def close(self) -> None:
        """Stop the reading thread."""
        self._forget_next()
        self._thread.shutdown(wait=True)

    def _forget_next(self) -> None:
        if self._next is not None:
            self._next[1].cancel()
            self._next = None

    def _take(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        if self._next is not None and self._next[0] == names:
            future = self._next[1]
            self._next = None
            return future.result()
        return self._read(names)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        members = [member for name in names for member in self._members[name]]
        return self.read({member: self._stored[member] for member in members})

    def read(self, stored: Mapping[str, str]) -> dict[str, Tensor]:
        """Return tensors, cast and on the device.

        Args:
            stored: name of the caller's choice -> name in the checkpoint.
        """
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name, kept in stored.items():
            by_file.setdefault(self._files[kept], []).append((name, kept))
        found: dict[str, Tensor] = {}
        for file, pairs in by_file.items():
            once: dict[str, Tensor] = {}
            with safetensors.safe_open(file, framework="pt") as tensors:
                for name, kept in pairs:
                    if kept not in once:
                        raw = tensors.get_tensor(kept)
                        self.bytes_read += raw.nbytes
                        # A copy in any case: what is read is the file itself, mapped into memory.
                        once[kept] = raw.to(self.device, self._dtypes[name], copy=True)
                        del raw
                    found[name] = once[kept]
        return {name: found[name] for name in stored}

    def _attach(self) -> None:
        """Let every module that holds parameters read them when it is called."""
        self._owner = {name: module for name, module in self.model.named_modules() if module._parameters}
        self._dtypes = {name: p.dtype for name, p in _parameters(self.model)}
        for name, module in self._owner.items():
            if not any(p is not None for p in module._parameters.values()):
                continue
            add_hook_to_module(module, _Reading(self, name))


class _Reading(ModelHook):
    """Reads a module's weights for each call; what Accelerate's own offloading does, from the checkpoint itself."""

    offload = True
    keeps_objects = True  # the empty parameters stay the same, so that tied ones remain one object

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self.weights_map = _StoredWeights(checkpoint, module)
        self.execution_device = checkpoint.device
        self.empty: dict[str, nn.Parameter] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.empty = {a: p for a, p in module._parameters.items() if p is not None}
        for attribute, parameter in self.empty.items():
            value = self.weights_map[attribute]
            module._parameters[attribute] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for attribute, parameter in self.empty.items():
            module._parameters[attribute] = parameter
        self.empty = {}
        return output


class _StoredWeights(Mapping[str, Tensor]):
    """The values of a module's own parameters, read anew at each look."""

    def __init__(self, checkpoint: Checkpoint, module: str) -> None:
        self.checkpoint, self.module = checkpoint, module

    def __getitem__(self, attribute: str) -> Tensor:
        name = f"{self.module}.{attribute}" if self.module else attribute
        return self.checkpoint.read({name: self.checkpoint._stored[name]})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint._owner[self.module]._parameters)

    def __len__(self) -> int:
        return len(self.checkpoint._owner[self.module]._parameters)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> safetensors file of a checkpoint.

    Raises:
        ModelError: there is no safetensors file, or one that the index names is missing or cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    elif (folder / "model.safetensors").is_file():
        with safetensors.safe_open(folder / "model.safetensors", framework="pt") as tensors:
            files = dict.fromkeys(tensors.keys(), folder / "model.safetensors")
    else:
        raise ModelError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json. Streaming reads weights from "
            "safetensors files: save the model with save_pretrained."
        )
    for file in set(files.values()):
        if file.parent.resolve() != folder.resolve() or not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is not in {folder}. Fetch the missing file.")
    return files


def _stored_names(model: nn.Module, files: Mapping[str, Path], folder: Path) -> dict[str, str]:
    """Return the checkpoint's name of every parameter of the model, under each of its names, with shapes checked."""
    base = getattr(model, "base_model_prefix", "") or ""
    aliases: dict[int, list[str]] = {}
    for name, parameter in _parameters(model):
        aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    shapes: dict[Path, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, parameter in _parameters(model):
        tried = [
            option
            for alias in (name, *aliases[id(parameter)])
            for option in (alias, alias.removeprefix(f"{base}."), f"{base}.{alias}")
        ]
        stored = next((option for option in tried if option in files), None)
        if stored is None:
            raise ModelError(
                f"{folder} has no tensor {name!r} for the parameter of shape {tuple(parameter.shape)} of "
                f"{type(model).__name__}; it has {len(files)} others. If they have the names of an older version, save "
                "the model again with save_pretrained(folder, save_original_format=False), or use --stream none."
            )
        found[name] = stored
        shapes.setdefault(files[stored], []).append((name, stored, tuple(parameter.shape)))
    for file, entries in shapes.items():
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                kept = {stored: tuple(tensors.get_slice(stored).get_shape()) for _, stored, _ in entries}
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}. Fetch it again.") from error
        for name, stored, shape in entries:
            if kept[stored] != shape:
                raise ModelError(
                    f"tensor {stored!r} in {file.name} has shape {kept[stored]}, and {type(model).__name__} needs "
                    f"{shape} for {name}. The checkpoint is of another model or its config.json was changed."
                )
    return found


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))
