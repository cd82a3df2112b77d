"""Which block of the Fisher a parameter belongs to, decided from its name alone.

A block structure is a partition of the parameters. Since Gram matrices add (the Gram of a union is the sum of the
Grams), any partition can be chosen after the gradients were stored.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping

from streamfisher.errors import ConfigError

STRUCTURES = ("layer", "module", "parameter", "none")

# `layers.3.`, `h.3.`, `encoder.layer.3.`, `albert_layer_groups.0.`, ... and `layer3.` of torchvision's ResNets.
_LAYER = re.compile(
    r"(?:^|\.)(?:\w+_)?(?:layers?|layer_groups|h|blocks?|resblocks|stages?|encoders|decoders)\.(\d+)(?=\.|$)"
    r"|(?:^|\.)layer(\d+)(?=\.)"
    r"|^(\d+)(?=\.)"
)
_STACK = re.compile(r"encoder|decoder|vision|text|audio|visual|language")
_EMBEDDING = re.compile(
    r"embed|(?:^|\.)(?:wte|wpe|shared|cls_token|dist_token|mask_token|class_token|pos_table|patchifier)(?:\.|$)",
    re.IGNORECASE,
)
_OUTPUT = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|output_layer|output|proj_out|cls|classifier|pre_classifier|score"
    r"|heads?|qa_outputs|generator|logits|predictions|vocab_projector|vocab_transform|vocab_layer_norm"
    r"|fc(?=\.(?:weight|bias)$))(?:\.|$)"
)
_NORM = re.compile(
    r"norm|(?:^|[._])ln(?:[._\d]|$)|(?:^|\.)ln_\w+|(?:^|\.)bn\d*(?:\.|$)|(?:^|\.)downsample\.1\.", re.IGNORECASE
)
_ATTENTION = re.compile(
    r"attn|attention|(?:^|\.)(?:[qkvo]_proj|qkv(?:_proj)?|query|key|value|query_key_value|Wqkv|[qkv]_lin|out_lin)(?:\.|$)",
    re.IGNORECASE,
)
_MLP = re.compile(
    r"mlp|feed_?forward|ffn|experts?|moe|DenseReluDense"
    r"|(?:^|\.)(?:fc\d|c_fc|c_proj|gate_proj|up_proj|down_proj|gate_up_proj|w[123]|wi|wi_\d|wo|lin[12]|linear[12]"
    r"|intermediate|output|dense_h_to_4h|dense_4h_to_h|ffn_output|router)(?:\.|$)"
)


def layer_key(name: str, *, prefixed: bool = False) -> str:
    """Return `layer_<i>`, `embedding`, `output` or `other` for a parameter's name.

    Args:
        name: as in `model.named_parameters()`.
        prefixed: put the stack before the key (`encoder_layer_0`), for models with more than one stack of layers.
    """
    match = _LAYER.search(name)
    if match:
        index = next(group for group in match.groups() if group is not None)
        return f"{_stack(name[: match.start()])}layer_{index}" if prefixed else f"layer_{index}"
    if _EMBEDDING.search(name) and not _OUTPUT.match(name):
        return "embedding"
    return "output" if _OUTPUT.search(name) else "other"


def module_key(name: str) -> str:
    """Return `attention`, `mlp`, `embedding`, `normalization`, `output` or `other` for a parameter's name."""
    in_layer = _LAYER.search(name) is not None
    if _NORM.search(name):
        return "normalization"
    if _ATTENTION.search(name):
        return "attention"
    if in_layer and _MLP.search(name):
        return "mlp"
    if not in_layer and _OUTPUT.search(name) and not name.startswith("embed_in"):
        return "output"
    if _EMBEDDING.search(name):
        return "embedding"
    return "mlp" if _MLP.search(name) else "other"


def assign_blocks(names: Iterable[str], structure: str | Mapping[str, str] = "layer") -> dict[str, str]:
    """Return `{parameter name: block key}`, blocks in the order in which their first parameter comes.

    Args:
        names: parameter names, in the model's order.
        structure: `'layer'`, `'module'`, `'parameter'`, `'none'`, or a mapping from glob pattern to block key; the
            pattern `'*'` takes what no other one matches.

    Raises:
        ConfigError: the structure is unknown, or a mapping leaves a parameter without a block, puts one into two
            blocks, or holds a pattern that matches nothing.
    """
    names = list(names)
    if isinstance(structure, Mapping):
        return _assign_by_patterns(names, structure)
    if structure == "layer":
        # Two parameters of one index in different stacks (encoder and decoder) must not share a block.
        stacks = {_stack(name[: match.start()]) for name in names if (match := _LAYER.search(name))}
        return {name: layer_key(name, prefixed=len(stacks) > 1) for name in names}
    if structure == "module":
        return {name: module_key(name) for name in names}
    if structure == "parameter":
        return {name: name for name in names}
    if structure == "none":
        return dict.fromkeys(names, "global")
    raise ConfigError(f"block structure {structure!r} is unknown; choose one of {', '.join(STRUCTURES)}.")


def group_blocks(assignment: Mapping[str, str]) -> dict[str, list[str]]:
    """Return `{block key: [parameter names]}` from `{parameter name: block key}`, orders kept."""
    blocks: dict[str, list[str]] = {}
    for name, key in assignment.items():
        blocks.setdefault(key, []).append(name)
    return blocks


def _assign_by_patterns(names: list[str], patterns: Mapping[str, str]) -> dict[str, str]:
    assignment: dict[str, str] = {}
    unused = dict.fromkeys(pattern for pattern in patterns if pattern != "*")
    for name in names:
        matching = [pattern for pattern in patterns if pattern != "*" and fnmatch.fnmatchcase(name, pattern)]
        for pattern in matching:
            unused.pop(pattern, None)
        keys = list(dict.fromkeys(str(patterns[pattern]) for pattern in matching or ["*"] if pattern in patterns))
        if not keys:
            raise ConfigError(
                f"parameter {name!r} matches none of the block patterns {list(patterns)}; add a pattern such as '*'."
            )
        if len(keys) > 1:
            raise ConfigError(
                f"parameter {name!r} belongs to {len(keys)} blocks, {' and '.join(keys)}, by the patterns "
                f"{', '.join(matching)}; blocks must not overlap."
            )
        assignment[name] = keys[0]
    if unused:
        raise ConfigError(
            f"the block pattern {next(iter(unused))!r} matches no parameter; the first are {', '.join(names[:3])}."
        )
    return assignment


def _stack(path: str) -> str:
    """Return `'encoder_'` for `'model.encoder'`: the last part of a path that tells one stack from another."""
    found = _STACK.findall(path)
    return f"{found[-1]}_" if found else ""


def unknown_block(key: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a block that there is not, with what may have been meant."""
    known = list(known)
    if key == "global":
        return ConfigError(
            "'global' is the union of the blocks' eigenvalues, and no block: it has no vectors and no Gram of its own. "
            f"The whole model is the block 'global' of --blocks none; the blocks here are {', '.join(known)}."
        )
    near = difflib.get_close_matches(key, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"there is no block {key!r}; the blocks are {', '.join(known)}.{meant}")
