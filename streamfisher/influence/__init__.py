"""What a Gram says of single samples: leverage, leave-one-out, duplicates, influence; matrices in, numbers out."""

from streamfisher.influence.damped import MeanProducts, damped_products
from streamfisher.influence.deletion import Deletion, leave_one_out
from streamfisher.influence.leverage import effective_dimension, leverage_scores
from streamfisher.influence.similarity import clusters_of, cosines, similar_pairs

__all__ = [
    # Of the samples of one Gram
    "leverage_scores",
    "effective_dimension",
    "leave_one_out",
    "Deletion",
    "cosines",
    "similar_pairs",
    "clusters_of",
    # Of queries
    "damped_products",
    "MeanProducts",
]
