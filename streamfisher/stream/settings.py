"""Which settings of a run a stream of layers cannot follow."""

from __future__ import annotations

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError


def check_settings(config: SpectralConfig) -> None:
    """Refuse settings that need the whole model at once.

    Raises:
        ConfigError: the message names the setting.
    """
    if config.store_centered:
        raise ConfigError(
            "store_centered=True takes a pass over all parameters at once, and stream='layers' has none. Leave it out: "
            "--center gives the covariance of uncentered gradients too."
        )
    if config.project is not None:
        raise ConfigError(
            f"project={config.project} and stream='layers' do not go together. Use --stream none, where waves keep "
            "within the budgets, or leave out --project: a stream deletes its exact gradients layer by layer."
        )
    if config.labels == "model":
        raise ConfigError(
            "labels='model' draws labels from the whole model's output before each batch, which stream='layers' does "
            "not have. Use --stream none, or labels of the data."
        )
