"""What does storing a teacher's features cost in bytes, and what is lost against the raw teacher?

Every way of storing them (float16, int8 with a step per component, int8 with a step per token; all channels or the
leading PCA components; as it is, or compressed by Blosc or Zstd, one row a chunk) is fitted on some images and measured
on others:

    synthetic      DINOv3-shaped features with outlier channels, drawn here; see `synthetic`
    mobilenet      with --real DATA: a trained MobileNetV2 on photographs, layers and grids as in configs/small.yaml
    dinov3 random  with --real DATA: timm's DINOv3 ViT-S with random parameters on the same photographs

kB are those of a row of the default configuration: three scales of grids 14, 7, 7 and `global` at width 768, checksums
and shard index included. `PCA 256` keeps 256 of 768 channels, and the same share of another width, so that sets compare
at equal bytes; `all` keeps every channel. Compressed sizes are scaled by what the measured features shrink to.
Cosine, Gram error and relative L2 are those of `pipeline.cache.codec.Fidelity`: means over scales, and of the 1 %
quantile of the cosine the worst scale. `q 99.9 %`: the step is from that quantile of a component, not its maximum;
`one step`: all components take the largest step, which leaves more for the compression.

DATA holds flickr8k/train/*.tar (photographs) and teacher/mobilenetv2_100.tf_in1k.fp16.safetensors.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import load, machine, markdown, parse, parser, report
from teacher_features import GRIDS, WIDTH, Features, real, synthetic

from pipeline.cache.codec import ComponentMaxima, Fidelity, ScaleCodec, SecondMoment, fit_basis
from pipeline.cache.compress import encoder
from pipeline.cache.layout import RowArray, ScaleInfo, StoredDtype, row_arrays
from pipeline.cache.shards import CRC_BYTES, INDEX_ENTRY_BYTES

COMPRESSION = {"plain": None, "blosc": ("blosc", 5), "zstd": ("zstd", 5)}
KEPT = (384, 256, 128)  # of 768 channels


@dataclass(frozen=True)
class Way:
    """One way of storing.

    Args:
        components: kept of 768 channels; None: all.
        quantile: of a component's magnitude, in per cent, that int8 steps come from; 100: its maximum.
        one_step: all components of an int8 scale take the largest of their steps.
    """

    dtype: StoredDtype
    components: int | None
    quantile: float = 100.0
    one_step: bool = False

    def __str__(self) -> str:
        kept = "all" if self.components is None else f"PCA {self.components}"
        cut = "" if self.quantile == 100 else f", q {self.quantile:.4g} %"
        return f"{self.dtype}, {kept}{cut}{', one step' if self.one_step else ''}"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the ways of storing one scale have in common: features (n, T, C), all eigenvectors (C, C), their moment."""

    features: np.ndarray
    basis: np.ndarray
    moment: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Calibration:
        moment = SecondMoment(features.shape[-1])
        moment.update(features)
        basis, _ = fit_basis(moment, features.shape[-1])
        assert basis is not None
        return cls(features, basis, moment.matrix)


# --- measuring --------------------------------------------------------------------------------------------------------


def fit(way: Way, on: Calibration) -> ScaleCodec:
    """A codec from the calibration's features."""
    width, basis, explained = on.features.shape[-1], None, 1.0
    if way.components is not None:
        basis = np.ascontiguousarray(on.basis[:, : round(width * way.components / WIDTH)])
        explained = float(np.einsum("ck,cd,dk->", basis, on.moment, basis, optimize=True) / np.trace(on.moment))
    codec = ScaleCodec(way.dtype, width, basis, None, explained)
    if way.dtype != "int8":
        return codec
    coefficients, maxima = codec.project(on.features), ComponentMaxima(codec.components)
    if way.quantile == 100:
        maxima.update(coefficients)
    else:
        flat = np.abs(coefficients).reshape(-1, codec.components)
        maxima.maxima = np.quantile(flat, way.quantile / 100, axis=0).astype(np.float32)
    steps = maxima.steps()
    return codec.with_steps(np.full_like(steps, steps.max()) if way.one_step else steps)


def measure(way: Way, fitted: dict[str, Calibration], held: Features) -> dict[str, float]:
    """Fidelity and bytes of one way on one set of features."""
    results, sizes, explained = [], {name: [] for name in COMPRESSION}, []
    for scale, features in held.items():
        codec, fidelity = fit(way, fitted[scale]), Fidelity()
        stored = codec.encode(features)
        fidelity.update(features, codec.dequantise(stored.values, stored.token_steps), codec.basis)
        results.append(fidelity.result() | {"saturated": stored.saturated / stored.values.size})
        explained.append(codec.explained)
        for name, shrunk in shrinking(stored.values).items():
            sizes[name].append(shrunk)
    of = {key: np.array([result[key] for result in results]) for key in results[0]}
    means = ("cosine_mean", "gram_mean_abs", "relative_l2", "saturated")
    figures = {key: float(of[key].mean()) for key in means}
    figures["cosine_worst_1pct"] = float(of["cosine_worst_1pct"].min())
    # A set with fewer scales than the default configuration lends its last one to the rest.
    shares = {name: {s: values[min(i, len(values) - 1)] for i, s in enumerate(GRIDS)} for name, values in sizes.items()}
    kilobytes = {f"{name}_kilobytes": default_bytes(way, share) / 1e3 for name, share in shares.items()}
    return figures | kilobytes | {"explained": float(np.mean(explained))}


def shrinking(values: np.ndarray, rows: int = 32) -> dict[str, float]:
    """Compressed bytes / bytes of stored values (n, T, K), row by row, by compression."""
    sample, found = values[:rows], {}
    for name, codec in COMPRESSION.items():
        encode = None if codec is None else encoder(codec[0], codec[1], values.dtype)  # type: ignore[arg-type]
        found[name] = 1.0 if encode is None else sum(len(encode(row)) for row in sample) / sample.nbytes
    return found


def default_bytes(way: Way, shares: dict[str, float] | None = None) -> float:
    """Bytes of a row of the default configuration in its shards; `shares` by which the scales' values shrink."""
    kept = WIDTH if way.components is None else way.components
    infos = [ScaleInfo(name, 0, grid, kept, way.dtype, WIDTH, 1.0) for name, grid in GRIDS.items()]

    def size(array: RowArray) -> float:
        return array.row_bytes * (shares or {}).get(array.name, 1.0) + CRC_BYTES + INDEX_ENTRY_BYTES

    return sum(size(array) for array in row_arrays(infos, WIDTH))


def ways() -> list[Way]:
    """All that are compared."""
    dtypes: tuple[StoredDtype, ...] = ("float16", "int8", "int8_token")
    found = [Way(dtype, components) for components in (None, *KEPT) for dtype in dtypes]
    found += [Way("int8", components, one_step=True) for components in (512, *KEPT[:2])]
    return found + [Way("int8", 256, quantile) for quantile in (99.99, 99.9, 99.0)]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--real", type=Path, metavar="DATA", help="also photographs and networks from this folder")
    arguments, (images,) = parse(command, {"images": (192, 12, "images to fit on; half as many are measured")})
    if images < 2:
        command.error("--images takes whole numbers from 2")
    run(arguments, images)


def run(arguments: argparse.Namespace, images: int) -> None:
    load_before, total = load(), images + images // 2
    width, grids = (48, {"fine": 4, "mid": 2}) if arguments.quick else (WIDTH, GRIDS)
    sets = {"synthetic": synthetic(total, width, grids)}
    if arguments.real is not None:
        sets |= real(arguments.real, total)
    cells: list[list[str]] = []
    figures: dict[str, float] = {"images_fitted": images, "images_measured": images // 2}
    for name, features in sets.items():
        fitted = {scale: Calibration.of(x[:images]) for scale, x in features.items()}
        held = {scale: x[images:] for scale, x in features.items()}
        for way in ways():
            found = measure(way, fitted, held)
            figures |= {f"{name}/{way}/{key}".replace(" ", "_").replace(",", ""): v for key, v in found.items()}
            cells.append([f"{name}: {way}", *shown(found)])
    columns = ["stored", "kB", "Blosc", "Zstd", "cosine", "worst 1 %", "Gram error", "relative L2", "cut off"]
    packages = ("numpy", "numcodecs") if arguments.real is None else ("numpy", "numcodecs", "torch", "timm")
    report(arguments, machine(packages), load_before, markdown(columns, cells), figures)


def shown(found: dict[str, float]) -> list[str]:
    sizes = [f"{found[f'{name}_kilobytes']:.1f}" for name in COMPRESSION]
    cosines = [f"{found[name]:.5f}" for name in ("cosine_mean", "cosine_worst_1pct", "gram_mean_abs")]
    return [*sizes, *cosines, f"{found['relative_l2']:.4f}", f"{found['saturated']:.0e}"]


if __name__ == "__main__":
    main()
