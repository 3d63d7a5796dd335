"""The demo's teacher: a small network of DINOv3's architecture, trained openly on generated scenes to name attributes.

There is no pretrained network to be had without a download, and one with random weights knows less about an image than
its pixels do. So the demo trains its own, for about a minute and with labels: it is no DINOv3 and is called none. What
it learns is what a teacher of dense features should know: which shape, colour and texture covers each patch. Its scenes
are a series of their own (other seeds), so it has seen none of the images it is asked about later.

Loss, over the patches p of a batch, those on an object o, and the scenes i:

    L = Σ_a c_a mean_p w_p CE_a(p) + c_place mean_o H(place_o) + mean_i BCE(presence_i)    a in {shape, colour, texture}

CE_a: cross-entropy over the attribute's classes and "background", w_p a smaller weight on background patches, c_a = 2
for the shape (the hardest), else 1. H: smooth L1 of where the patch lies on its object (from the object's centre, and
the object's radius, in patches): a shape cannot be named without its neighbours, and this makes a token look at them
(tried: 24 % instead of 21 % of shapes named after 200 steps). BCE: which shapes, colours and textures occur in the
scene, read from CLS.

Legend: n scenes, B a batch of them, S image size, G native grid, C width, A attributes, K classes of one attribute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.console import progress
from pipeline.data.scene_files import ATTRIBUTES
from pipeline.data.scenes import draw, make_scene, patch_labels
from pipeline.errors import PipeError
from pipeline.run_folder import sha256_file, write_bytes, write_json
from pipeline.teacher.features import Backbone

CLASSES = sum(map(len, ATTRIBUTES.values()))
WEIGHT = {"shape": 2.0}  # c_a
STATEMENT = "A small network of DINOv3's architecture, trained on generated scenes with labels. It is not DINOv3."


@dataclass(frozen=True)
class Recipe:
    """How the teacher is trained; all of it is written into its card.

    Attributes:
        steps, batch_size, lr, warmup_steps, weight_decay: of AdamW with a cosine to zero.
        scenes: training scenes, of series `seed`; each is also seen mirrored.
        held_out: scenes of series `seed + 1` on which it is scored.
        background_weight: w_p of a background patch, against 1.
        place_weight: c_place.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.05
    scenes: int = 2000
    held_out: int = 250
    seed: int = 9000
    background_weight: float = 0.15
    place_weight: float = 2.0


@dataclass(frozen=True)
class LabelledScenes:
    """Scenes and what is true of them.

    Attributes:
        images: (n, 3, S, S) float32, normalised.
        patches: (n, G², A) int64, the class of the object on a patch; K on background.
        places: (n, G², 3) float32, the patch's centre from its object's (x, y) and that object's radius, in patches.
        present: (n, ΣK) float32, 1 for the classes that occur.
    """

    images: Tensor
    patches: Tensor
    places: Tensor
    present: Tensor

    def batch(self, rows: Tensor, *, mirrored: bool) -> LabelledScenes:
        """The rows (B,), mirrored left to right with all that is true of them."""
        images, patches, places = self.images[rows], self.patches[rows], self.places[rows]
        if mirrored:
            grid = math.isqrt(patches.shape[1])
            images = images.flip(3)
            patches = patches.unflatten(1, (grid, grid)).flip(2).flatten(1, 2)
            places = places.unflatten(1, (grid, grid)).flip(2).flatten(1, 2) * torch.tensor([-1.0, 1.0, 1.0])
        return LabelledScenes(images, patches, places, self.present[rows])


class Heads(nn.Module):
    """Linear readouts, thrown away afterwards: K + 1 classes a patch for each attribute, its place; ΣK a scene."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({name: nn.Linear(width, len(names) + 1) for name, names in ATTRIBUTES.items()})
        self.place = nn.Linear(width, 3)
        self.scene = nn.Linear(width, CLASSES)


def train_scene_teacher(
    weights: Path, *, name: str, model_args: Mapping[str, Any], image_size: int, recipe: Recipe
) -> dict[str, Any]:
    """Train the teacher and write `weights` (safetensors, the timm network's own state dict) and a card beside it.

    Args:
        weights: a .safetensors file; the card is the same name with .json.
        name, model_args: of the timm network, as `load_teacher` will be given them.

    Returns:
        the card: what it is, how it was trained, and how often it is right on scenes it has not seen.

    Raises:
        PipeError: the network has no CLS token or no square grid of patches.
    """
    model = new_network(name, model_args, image_size, recipe.seed)
    backbone = Backbone(model)
    grid = image_size // backbone.stride(0)
    data = labelled_scenes(recipe.scenes, seed=recipe.seed, size=image_size, grid=grid, model=model)
    started = time.monotonic()
    heads, losses = fit(model, data, recipe)
    seconds = time.monotonic() - started
    test = labelled_scenes(recipe.held_out, seed=recipe.seed + 1, size=image_size, grid=grid, model=model)
    write_bytes(weights, save({key: value.contiguous() for key, value in model.state_dict().items()}))
    card = {
        "what": STATEMENT,
        "name": name,
        "model_args": dict(model_args),
        "image_size": image_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe),
        "seconds": round(seconds, 1),
        "loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
        "held_out": score(model, heads, test),
        "weights_sha256": sha256_file(weights),
    }
    write_json(card_path(weights), card)
    return card


def card_path(weights: Path) -> Path:
    """Where the card of a weights file lies."""
    return weights.with_suffix(".json")


def new_network(name: str, model_args: Mapping[str, Any], image_size: int, seed: int) -> nn.Module:
    """The timm network as `load_teacher` makes it, its weights drawn from `seed`.

    timm draws every matrix with a deviation of 0.02, which suits widths of 400 and more; at a width of 128 tokens would
    hardly mix at first, and there is a minute: here it is 1/√fan_in.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name, pretrained=False, **{"img_size": image_size, **model_args})
        for weight in model.parameters():
            if weight.ndim in (2, 4):
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    if not Backbone(model).has_cls:
        raise PipeError("this network has no CLS token", where=f"teacher.name {name}", fix="use a DINOv3 ViT")
    return model


def labelled_scenes(n: int, *, seed: int, size: int, grid: int, model: nn.Module) -> LabelledScenes:
    """Draw scenes 0 … n - 1 of a series with the labels of their patches, normalised for `model`."""
    pixels = np.empty((n, size, size, 3), dtype=np.uint8)
    patches = np.empty((n, grid * grid, len(ATTRIBUTES)), dtype=np.int64)
    places = np.zeros((n, grid * grid, 3), dtype=np.float32)
    present = np.zeros((n, CLASSES), dtype=np.float32)
    middles = np.stack(np.meshgrid(*2 * [np.arange(grid) + 0.5]), axis=-1).reshape(-1, 2)  # (G², 2): x, y in patches
    first = np.cumsum([0, *map(len, ATTRIBUTES.values())])[:-1]
    with progress("drawing the teacher's scenes", total=n, unit="images") as bar:
        for index in range(n):
            scene = make_scene(seed, index)
            pixels[index] = np.asarray(draw(scene, size=size))
            own = [[c.index(getattr(thing, a)) for a, c in ATTRIBUTES.items()] for thing in scene.objects]
            table = np.array([*own, [len(c) for c in ATTRIBUTES.values()]])  # the last row: background, at -1
            numbers = patch_labels(scene, grid).ravel()
            patches[index] = table[numbers]
            on = numbers >= 0
            geometry = grid * np.array([[thing.x, thing.y, thing.radius] for thing in scene.objects])[numbers[on]]
            places[index, on] = np.concatenate([middles[on] - geometry[:, :2], geometry[:, 2:]], axis=1)
            present[index, (table[:-1] + first).ravel()] = 1
            bar.advance()
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return LabelledScenes(images.contiguous(), *map(torch.from_numpy, (patches, places, present)))


def fit(model: nn.Module, data: LabelledScenes, recipe: Recipe) -> tuple[Heads, list[float]]:
    """Train `model` in place; returns the heads and the loss of every step. One seed, one machine: the same weights."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        heads = Heads(int(model.num_features))  # type: ignore[arg-type]
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    losses = []
    with progress("training the demo's teacher", total=recipe.steps, unit="steps") as bar:
        for step in range(recipe.steps):
            rows = torch.randint(len(data.images), (recipe.batch_size,), generator=generator)
            batch = data.batch(rows, mirrored=bool(torch.rand((), generator=generator) < 0.5))
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / recipe.warmup_steps)
                group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            loss = objective(model, heads, batch, recipe)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            bar.note(f"loss {losses[-1]:.2f}")
            bar.advance()
    return heads, losses


def tokens_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """CLS (B, C) and patch tokens (B, G², C) after the final norm."""
    tokens: Tensor = model.forward_features(images)  # type: ignore[operator]  # (B, 1 + registers + G², C)
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    return tokens[:, 0], tokens[:, prefix:]


def objective(model: nn.Module, heads: Heads, batch: LabelledScenes, recipe: Recipe) -> Tensor:
    """L of the module's docstring, ()."""
    cls, tokens = tokens_of(model, batch.images)
    loss = F.binary_cross_entropy_with_logits(heads.scene(cls), batch.present)
    for a, (attribute, head) in enumerate(heads.patch.items()):
        w = torch.ones(len(ATTRIBUTES[attribute]) + 1)
        w[-1] = recipe.background_weight
        entropy = F.cross_entropy(head(tokens).flatten(0, 1), batch.patches[..., a].flatten(), weight=w)
        loss = loss + WEIGHT.get(attribute, 1.0) * entropy
    on = batch.patches[..., 0] < len(ATTRIBUTES["shape"])
    return loss + recipe.place_weight * F.smooth_l1_loss(heads.place(tokens)[on], batch.places[on])


@torch.no_grad()
def score(model: nn.Module, heads: Heads, data: LabelledScenes, batch_size: int = 100) -> dict[str, Any]:
    """Share of object patches whose attribute is named rightly, with the share of the commonest class beside it."""
    model.eval()
    tokens = torch.cat([tokens_of(model, images)[1] for images in data.images.split(batch_size)])
    scored: dict[str, Any] = {}
    for a, (attribute, classes) in enumerate(ATTRIBUTES.items()):
        truth = data.patches[..., a]
        on_object = truth < len(classes)
        named = heads.patch[attribute](tokens)[..., :-1].argmax(dim=-1)
        accuracy = float((named == truth)[on_object].float().mean())
        commonest = float(torch.bincount(truth[on_object]).max() / on_object.sum())
        scored[attribute] = {"accuracy": round(accuracy, 4), "commonest_class": round(commonest, 4)}
    return scored | {"patches": int(on_object.sum())}
