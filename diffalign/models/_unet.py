"""What SD and SDXL share: the geometry of a UNet, and the original layout of their files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffalign.common.errors import UserError
from diffalign.models import _ldm
from diffalign.models._export import Lora, kohya_state
from diffalign.models._pipeline import PipelineModel


class UNetModel(PipelineModel):
    """A backbone of the Stable Diffusion family; subclasses name the encoders and the conditioning."""

    def read_geometry(self, network_config: dict[str, Any]) -> None:
        """Each block but the last halves the sides."""
        size = network_config["sample_size"]
        side = size if isinstance(size, int) else max(size)
        self.size_multiple = self.latent_scale * 2 ** (len(network_config["block_out_channels"]) - 1)
        self.default_resolution = side * self.latent_scale

    def check_network(self, config: dict[str, Any], path: str) -> None:
        """Refuses a UNet of another family, or of other channels or text embeddings than the base's."""
        self.spec.check_class(config, path)
        self.check_family(config, path)
        channels, width = config["in_channels"], config["cross_attention_dim"]
        base_width = self._encoders_config.get("cross_attention_dim")
        if channels != self.latent_channels:
            raise UserError(
                f"the UNet of {path} takes {channels} channels, its VAE gives {self.latent_channels}: "
                "inpainting and depth bases cannot be aligned here, use a text-to-image base"
            )
        if width != base_width:
            raise UserError(
                f"the UNet of {path} takes text embeddings of width {width}, the base's are of width "
                f"{base_width}: use the base that it was trained from"
            )

    def check_family(self, unet_config: dict[str, Any], path: str) -> None:
        """Refuses a UNet of another family, which comes from `path`."""

    def kohya_layer_name(self, layer: str) -> str:
        """A UNet layer's name in the layout that kohya's scripts train this family in."""
        raise NotImplementedError

    def kohya_state(self, lora: Lora) -> dict[str, Tensor]:
        """Each layer under a name of its own."""
        return kohya_state(lora, self.kohya_layer_name)

    def check_single_file(self) -> None:
        """Refuses nothing: the family was published in that layout."""

    def original_encoder_state(self) -> dict[str, Tensor]:
        """The text encoders' tensors by the names of the family's published single file."""
        raise NotImplementedError

    def original_state(self) -> dict[str, Tensor]:
        """All tensors by the names of the family's published single file."""
        return {
            **_ldm.unet_state(self.parts["unet"]),
            **_ldm.vae_state(self.parts["vae"]),
            **self.original_encoder_state(),
        }
