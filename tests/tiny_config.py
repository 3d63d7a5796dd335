"""The smallest configuration that both stages run on, for tests that have their own use for its parts."""

from __future__ import annotations

from typing import Any

TINY_CONFIG: dict[str, Any] = {
    "workspace": "workspace",
    "data": {"source": "tars", "workers": 0},
    "teacher": {
        "name": "vit_small_patch16_dinov3_qkvb",
        "model_args": {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 2,
            "init_values": 1.0,
        },
        "random_weights": True,
        "image_size": 32,
        "batch_size": 8,
        "pca": 16,
        "calibration_rows": 24,
        "scales": [{"name": "fine", "layer": -1, "grid": 4}, {"name": "mid", "layer": 1, "grid": 2}],
    },
    "model": {
        "trunk": {
            "embed_dim": 16,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "image_size": 32,
        "student": {"patch": 8, "depth": 2, "text_width": 16, "text_layers": 1},
    },
    "train": {
        "batch_size": 8,
        "max_steps": 6,
        "warmup_steps": 0,
        "transition_depth": 4,
        "log_every": 1,
        "checkpoint_every": 3,
        "validate_every": 3,
    },
    "evaluate": {"batch_size": 8},
}
