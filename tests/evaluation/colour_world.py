"""Tiny datasets on disk and tiny models: colours stand for classes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

COLOURS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (30, 60, 220)}
NAMES = list(COLOURS)


def jpeg(colour: tuple[int, int, int], seed: int, size: int = 16) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 12, size=(size, size, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def colour_members(n: int, first_seed: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for k in range(n):
        members.append((f"s{k:04d}.jpg", jpeg(COLOURS[NAMES[k % 3]], first_seed + k)))
        members.append((f"s{k:04d}.cls", str(k % 3).encode()))
    return members


def write_colours(root: Path, splits: dict[str, int]) -> Path:
    """A webdataset of three colours."""
    for number, (split, n) in enumerate(splits.items()):
        write_tar(root / split / "0.tar", colour_members(n, first_seed=1000 * number))
        (root / split / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("\n".join(NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c} thing.\nsomething {c}.\n")
    return root


class ColourModel(torch.nn.Module):
    """Images by their mean colour, texts by the colour words in them: a perfect two-tower model. Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.calls += 1
        return images.mean(dim=(2, 3)) + 1e-3

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.calls += 1
        return tokens.float() + 1e-3


class NodeModel(ColourModel):
    """Two nodes of different worth: `trunk` sees one channel only."""

    def image_nodes(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.encode_image(images)
        return {"trunk": output * torch.tensor([1.0, 0.0, 0.0]) + 1e-3, "gated": output}

    def text_nodes(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.encode_text(tokens)
        return {"trunk": output, "gated": output}

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> SimpleNamespace:
        """An injection on the image side alone, its gate open at a quarter."""
        z, t = (F.normalize(x, dim=-1) for x in (images.mean(dim=(2, 3)) + 1e-3, tokens.float() + 1e-3))
        gate, delta = torch.full_like(z, 0.25), t.roll(1, dims=1)
        side = SimpleNamespace(gate=gate, delta=delta, gamma=torch.tensor(0.1))
        return SimpleNamespace(z=z, t=t, image=side, text=None, logit_scale=torch.tensor(10.0))


class Broken(torch.nn.Module):
    """A model that must not be asked."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was called")

    encode_text = encode_image


def tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[int(name in text) for name in NAMES] for text in texts])


def preprocess(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
