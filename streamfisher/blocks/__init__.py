"""Which parameters belong together: block structures, and the keys under which their Grams are stored."""

from streamfisher.blocks.gram_keys import check_grouping, gram_groups, possible_structures
from streamfisher.blocks.structures import STRUCTURES, assign_blocks, group_blocks, layer_key, module_key, unknown_block

__all__ = [
    # Block structures
    "STRUCTURES",
    "assign_blocks",
    "group_blocks",
    "layer_key",
    "module_key",
    "unknown_block",
    # Grams by the parameter, or by groups of them
    "gram_groups",
    "possible_structures",
    "check_grouping",
]
