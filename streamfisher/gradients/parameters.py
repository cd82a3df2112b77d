"""Which parameters are captured, which are left out and why, and where each of them lives in the model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from streamfisher.errors import ModelError
from streamfisher.models.offload import check_ties, has_values, identity


@dataclass(frozen=True)
class ParameterInfo:
    """One captured parameter tensor."""

    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Slot:
    """One place where a captured parameter hangs in the module tree; a tied parameter has several."""

    name: str  # full dotted name of this place
    owner: str  # name of the module that holds it directly; '' is the model itself
    attribute: str  # its name in that module
    parameter: str  # the parameter's one public name: the first of its places


@dataclass(frozen=True)
class Selection:
    """The outcome of `select_parameters`."""

    tensors: dict[str, nn.Parameter]  # captured, in the order of `model.named_parameters()`
    infos: dict[str, ParameterInfo]
    excluded: dict[str, str]  # name -> reason
    slots: tuple[Slot, ...]  # every place of every captured parameter


def select_parameters(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), *, need_values: bool = True
) -> Selection:
    """Choose the trainable parameters whose names match `include` (all, if empty) and no pattern of `exclude`.

    A tied parameter appears once, under the first of its names; a pattern that matches any of its names counts.

    Args:
        model: the model whose `requires_grad` flags say what is trainable.
        include: glob patterns (`*`, `?`, `[...]`) of full parameter names.
        exclude: glob patterns, applied after `include`.
        need_values: refuse parameters without values; a plan needs none.

    Raises:
        ModelError: a parameter has no values (meta device, lazy modules), a trainable one is complex or in
            TorchScript, nothing is trainable, a pattern matches no parameter, or nothing is left.
    """
    _check_kinds(model)
    check_ties(model)
    include, exclude = _patterns(include), _patterns(exclude)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(identity(model, name, parameter), []).append(name)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(alias, pattern) for aliases in names.values() for alias in aliases):
            known = [alias for aliases in names.values() for alias in aliases]
            raise ModelError(
                f"The pattern {pattern!r} matches no parameter of {type(model).__name__}. "
                f"{_instead(pattern, known) or _some(names)}"
            )

    tensors: dict[str, nn.Parameter] = {}
    excluded: dict[str, str] = {}
    trainable = 0
    for name, parameter in model.named_parameters():
        key = identity(model, name, parameter)
        if names[key][0] != name:
            continue  # an offloaded tied parameter, which is another object at each of its places
        if need_values and not has_values(model, name, parameter):
            raise ModelError(f"Parameter {name!r} is on the meta device and has no values. Load the weights first.")
        if not parameter.dtype.is_floating_point and not parameter.dtype.is_complex:
            excluded[name] = f"holds integers ({parameter.dtype}), which have no gradient"
            continue
        if not parameter.requires_grad:
            excluded[name] = "frozen"
            continue
        if parameter.numel() == 0:
            excluded[name] = f"has no elements (shape {tuple(parameter.shape)})"
            continue
        if parameter.dtype.is_complex:
            raise ModelError(
                f"Parameter {name!r} is complex ({parameter.dtype}); the Fisher is defined here for real parameters. "
                "Store its real and imaginary parts as two parameters, or freeze it."
            )
        trainable += 1
        aliases = names[key]
        hit = _first_match(aliases, exclude)
        if include and _first_match(aliases, include) is None:
            excluded[name] = "not in the included patterns"
        elif hit is not None:
            excluded[name] = f"excluded by pattern {hit!r}"
        else:
            tensors[name] = parameter
    if not trainable:
        raise ModelError(
            f"{type(model).__name__} has no trainable parameters ({len(names)} in all, every one frozen or without "
            "a gradient). Set requires_grad=True on those to analyse."
        )
    if not tensors:
        raise ModelError(f"The include and exclude patterns leave none of {trainable} trainable parameters.")

    infos = {n: ParameterInfo(n, tuple(p.shape), p.numel(), p.dtype) for n, p in tensors.items()}
    public = {alias: name for aliases in names.values() for name in aliases[:1] if name in tensors for alias in aliases}
    slots = [
        Slot(name, module_name, attribute, public[name])
        for module_name, module in model.named_modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and (name := f"{module_name}.{attribute}" if module_name else attribute) in public
    ]
    return Selection(tensors, infos, excluded, tuple(slots))


def _check_kinds(model: nn.Module) -> None:
    """Refuse what has no shape yet, and code that no hook can see into."""
    for module_name, module in model.named_modules():
        trained = [name for name, parameter in module._parameters.items() if parameter is not None]
        for name in trained:
            if is_lazy(module._parameters[name]):
                raise ModelError(
                    f"Parameter {name!r} of {module_name or 'the model'} ({type(module).__name__}) has no shape yet. "
                    "Call the model once on a batch, which gives it one."
                )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ModelError(
                f"{module_name or 'the model'} is a {type(module).__name__}, whose copies no hook sees. Give what it "
                "wraps (model.module); samples are spread over devices by `accelerate launch`."
            )
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted and any(parameter.requires_grad for parameter in module.parameters()):
            raise ModelError(
                f"{module_name or 'the model'} is TorchScript ({type(module).__name__}), which no hook sees into. Give "
                "the module that it was scripted or traced from."
            )


def _patterns(value: Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _first_match(aliases: Sequence[str], patterns: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns for alias in aliases if fnmatchcase(alias, pattern)), None)


def _instead(pattern: str, known: Sequence[str]) -> str:
    """Return what to write where a pattern is a part of names, or nearly a name; or nothing."""
    part = pattern.strip("*")
    count = sum(part in name for name in known)
    if part and count:
        return f"A pattern must match the whole name: '*{part}*' matches {count} of them."
    pieces = list(dict.fromkeys([*known, *(piece for name in known for piece in name.split("."))]))
    near = difflib.get_close_matches(part, pieces, n=1)
    if not near:
        return ""
    return f"Did you mean {near[0]!r}?" if near[0] in known else f"Did you mean '*{near[0]}*'?"


def _some(names: dict[int, list[str]]) -> str:
    first = [aliases[0] for aliases in names.values()][:5]
    return f"Its parameters are named for example {', '.join(first)}." if first else "It has no parameters."
