"""The trunk's own maps: those that its forward pass goes through."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SIZE, batch, build, shaken

from pipeline.models.trunk_map import at_grid, trunk_maps


@pytest.mark.parametrize("trunk", ["resnet", "vit"])
def test_the_deepest_map_is_what_the_tower_itself_pools(trunk):
    model = shaken(build(trunk, student=False))
    images, _ = batch(model)
    visual, seen = model.trunk.clip.visual, []
    inner = visual.layer4 if trunk == "resnet" else visual.ln_post
    handle = inner.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        visual(images)
        handle.remove()
        deepest = trunk_maps(visual, images)[-1]
    if trunk == "resnet":
        assert torch.equal(deepest, seen[0])
    else:  # the tower may norm the class token alone; the tokens' order is the transformer's
        with torch.no_grad():
            own = visual.ln_post(visual.transformer(visual._embeds(images)))[:, 1:]
        assert torch.equal(deepest.flatten(2).transpose(1, 2), own)
        assert deepest.shape[2:] == (SIZE // 16, SIZE // 16)


def test_a_grid_takes_the_deepest_map_that_it_divides():
    maps = [torch.randn(2, c, side, side) for c, side in ((3, 16), (5, 8), (7, 4), (9, 3))]
    assert torch.equal(at_grid(maps, 4), maps[2].flatten(2).transpose(1, 2))
    pooled = at_grid(maps, 8)
    assert torch.equal(pooled, maps[1].flatten(2).transpose(1, 2))
    quarter = torch.stack([maps[2][:, :, r : r + 2, c : c + 2].mean((2, 3)) for r in (0, 2) for c in (0, 2)], 1)
    torch.testing.assert_close(at_grid(maps, 2), quarter)
    assert at_grid(maps, 5).shape == (2, 25, 5)  # none is a multiple: the deepest that is fine enough
    assert at_grid(maps, 20).shape == (2, 400, 3)  # none is fine enough: the finest
