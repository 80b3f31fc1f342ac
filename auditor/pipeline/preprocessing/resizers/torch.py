"""PyTorch: ``interpolate`` on float pixels, rounded back: what torchvision does to tensors."""

from __future__ import annotations

from auditor.ports import Array


class Torch:
    """``torch.nn.functional.interpolate`` with ``align_corners=False``."""

    package = "torch"

    @property
    def interpolations(self) -> dict[str, tuple[bool, ...]]:
        """Antialiasing is a switch, on by default in torchvision."""
        return {"bilinear": (True, False), "bicubic": (True, False), "nearest": (False,)}

    def version(self) -> str:
        """PyTorch."""
        import torch

        return f"PyTorch {torch.__version__}"

    def resize(
        self, image: Array, size: tuple[int, int], interpolation: str, antialias: bool
    ) -> Array:
        """Interpolated in float32, rounded half to even and clipped to 0..255."""
        import torch

        torch.set_num_threads(1)  # photographs run beside each other: more would only wait
        pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
        if interpolation == "nearest":
            resized = torch.nn.functional.interpolate(pixels, size, mode="nearest")
        else:
            resized = torch.nn.functional.interpolate(
                pixels, size, mode=interpolation, align_corners=False, antialias=antialias
            )
        rounded = resized.round().clamp(0, 255).to(torch.uint8)
        result: Array = rounded[0].permute(1, 2, 0).contiguous().numpy()
        return result


LIBRARY = Torch()
