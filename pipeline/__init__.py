"""DINORANKCLIP (arXiv 2605.06592): CLIP training with a cached DINOv3 teacher and a high-order ranking loss.

The library behind the `pipe` command; each part is usable alone and takes plain arguments.
"""

__version__ = "0.1.0"
