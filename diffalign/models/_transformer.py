"""What the transformer backbones share: the geometry of patches, and prompts of several encoders."""

from __future__ import annotations

from typing import Any

from diffalign.common.errors import UserError
from diffalign.models._pipeline import PipelineModel


class TransformerModel(PipelineModel):
    """A backbone whose network is a transformer over patches of the latents."""

    def read_geometry(self, network_config: dict[str, Any]) -> None:
        """Sides are whole numbers of patches."""
        self.patch = self.patch_size(network_config)
        self.size_multiple = self.latent_scale * self.patch
        self.default_resolution = self.base_resolution(network_config)

    def patch_size(self, network_config: dict[str, Any]) -> int:
        """Latents a side of a patch."""
        size: int = network_config["patch_size"]
        return size

    def base_resolution(self, network_config: dict[str, Any]) -> int:
        """Pixels a side that the base was made for."""
        side: int = network_config["sample_size"]
        return side * self.latent_scale

    def check_network(self, config: dict[str, Any], path: str) -> None:
        """Refuses a transformer of another family, of other channels or text embeddings than the base's."""
        self.spec.check_class(config, path)
        if self.latent_inputs(config) != self.latent_channels:
            raise UserError(
                f"the transformer of {path} takes {self.latent_inputs(config)} channels, its VAE gives "
                f"{self.latent_channels}: use a text-to-image base"
            )
        for key in self.text_widths:
            if config[key] != self._encoders_config.get(key):
                raise UserError(
                    f"the transformer of {path} takes text embeddings of width {config[key]}, the base's are "
                    f"of width {self._encoders_config.get(key)}: use the base that it was trained from"
                )

    text_widths: tuple[str, ...] = ()
    """Keys of the transformer's configuration that say how wide its text embeddings are."""

    def latent_inputs(self, config: dict[str, Any]) -> int:
        """Channels of the latents that a transformer takes."""
        channels: int = config["in_channels"]
        return channels
