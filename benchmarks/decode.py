"""How fast is a JPEG decoded, and are the pixels those that Pillow gives?

Tasks in turns, on the same files, in one thread:

    ours               `pipeline.data.samples.decode_image`, as both stages call it
    Pillow             open, decode, copy: what ours was before it left out the copy
    Pillow, draft      libjpeg decodes at 1/2, 1/4 or 1/8 where that is no smaller than the view: other pixels
    torchvision        `torchvision.io.decode_jpeg` on the CPU, to a tensor
    torchvision, PIL   the same made into an image of Pillow's, which the view is cut from
    nvJPEG             `decode_jpeg(device="cuda")`, a batch at a time; only where there is a GPU

Decoding is timed alone. What the pixels differ by is measured after the view (shorter side to 224, centre cut out), in
grey levels, and by the cosine of a teacher's tokens between the two pictures: MobileNetV2 with random weights, or with
--teacher's. The pictures are made here at several sizes, or are photographs with --data (at most --images of them,
whatever their sizes).
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Timing, interleave, load, machine, markdown, median_interval, parse, parser, report
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.cache.layout import GLOBAL, ScaleSpec
from pipeline.data.roi import cosines
from pipeline.data.samples import decode_image
from pipeline.data.views import View
from pipeline.teacher.teacher import Teacher, load_teacher

SIZES = ((256, 256), (500, 375), (1024, 768), (2048, 1536))
PIXELS = 224
REFERENCE = "Pillow"
Decode = Callable[[bytes], object]


def made(width: int, height: int, count: int) -> list[bytes]:
    """JPEGs (quality 90, chroma halved) of slopes at several scales and grain, about as large as photographs'."""
    rng, files = np.random.default_rng(width), []
    for _ in range(count):
        picture = np.zeros((height, width, 3))
        for cells, strength in ((4, 60.0), (16, 30.0), (64, 12.0)):
            coarse = rng.normal(128, 60, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture += strength / 60 * (np.asarray(smooth, np.float64) - 128)
        picture += rng.normal(0, 4, picture.shape) + 128
        out = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def photographs(source: Path, count: int) -> list[bytes]:
    """The first JPEGs of the tars."""
    files: list[bytes] = []
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".jpeg")) and len(files) < count:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    files.append(stream.read())
    return files


# --- decoders ---------------------------------------------------------------------------------------------------------


def by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        image.load()
        return image.copy() if image.mode == "RGB" else image.convert("RGB")


def by_draft(data: bytes, pixels: int = PIXELS) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        image.draft("RGB", (pixels, pixels))
        image.load()
        return image.convert("RGB")


def by_torchvision(data: bytes) -> torch.Tensor:
    """(3, H, W) uint8."""
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def by_torchvision_to_pillow(data: bytes) -> Image.Image:
    return as_image(by_torchvision(data))


def on_gpu(files: list[bytes]) -> list[torch.Tensor]:
    """(3, H, W) uint8 each, on the GPU."""
    inputs = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    decoded = decode_jpeg(inputs, mode=ImageReadMode.RGB, device="cuda")
    torch.cuda.synchronize()
    return decoded


def as_image(pixels: object) -> Image.Image:
    if isinstance(pixels, torch.Tensor):
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    assert isinstance(pixels, Image.Image)
    return pixels


def tasks() -> dict[str, Callable[[list[bytes]], list[object]]]:
    """Name → files to pictures."""
    singly: dict[str, Decode] = {
        "ours": decode_image,
        REFERENCE: by_pillow,
        "Pillow, draft": by_draft,
        "torchvision": by_torchvision,
        "torchvision, PIL": by_torchvision_to_pillow,
    }
    found: dict[str, Callable[[list[bytes]], list[object]]] = {
        name: partial(_each, decode) for name, decode in singly.items()
    }
    return found | ({"nvJPEG": on_gpu} if torch.cuda.is_available() else {})  # type: ignore[dict-item]


def _on(way: Callable[[list[bytes]], list[object]], files: list[bytes]) -> Callable[[int], object]:
    return lambda _: way(files)


def _each(decode: Decode, files: list[bytes]) -> list[object]:
    return [decode(data) for data in files]


# --- measuring --------------------------------------------------------------------------------------------------------


def differences(ours: list[object], theirs: list[object], teacher: Teacher) -> dict[str, float]:
    """Of two ways to decode the same files: share of equal pictures, and what is left after the view."""
    view = View("crop", teacher.image_size)
    a, b = [as_image(x) for x in ours], [as_image(x) for x in theirs]
    seen = [np.stack([np.asarray(view(image)) for image in images]) for images in (a, b)]
    levels = np.abs(seen[0].astype(np.int16) - seen[1])
    found = {"equal_share": float(np.mean([np.array_equal(x, y) for x, y in zip(a, b, strict=True)]))}
    found |= {"most_grey_levels": float(levels.max()), "mean_grey_levels": float(levels.mean())}
    with torch.inference_mode():
        tokens = [teacher(teacher.normalise(torch.from_numpy(pixels))) for pixels in seen]
    of_scales = [name for name in tokens[0] if name != GLOBAL]
    each = [cosines(tokens[0][name].numpy(), tokens[1][name].numpy()) for name in of_scales]
    return found | {"least_cosine": float(np.min(each)), "mean_cosine": float(np.mean(each))}


def row(
    size: str, name: str, timings: dict[str, Timing], count: int, found: dict[str, float]
) -> tuple[list[str], dict[str, float]]:
    timing, other = timings[name], timings[REFERENCE]
    milliseconds, ratio = 1e3 * timing.median("cpu") / count, 1 / timing.ratio(other, "cpu")
    low, high = median_interval([other.cpu[i] / timing.cpu[i] for i in timing.cpu])
    key = f"{size}/{name}".replace(" ", "_")
    figures = {f"{key}/cpu_milliseconds_per_image": milliseconds, f"{key}/ratio_of_rate_to_Pillow": ratio}
    figures |= {f"{key}/{what}": value for what, value in found.items()}
    if np.isfinite(low):
        figures |= {f"{key}/ratio_of_rate_to_Pillow_low": low, f"{key}/ratio_of_rate_to_Pillow_high": high}
    cells = [f"{size}: {name}", f"{milliseconds:.2f}", f"{ratio:.3f}"]
    cells += [
        f"{low:.3f} to {high:.3f}" if np.isfinite(low) else "too few rounds",
        f"{100 * found['equal_share']:.0f} %",
    ]
    cells += [f"{found['most_grey_levels']:.0f}", f"{found['mean_grey_levels']:.3f}"]
    return [*cells, f"{found['mean_cosine']:.4f}", f"{found['least_cosine']:.4f}"], figures


def network(weights: Path | None) -> Teacher:
    """MobileNetV2 as configs/small.yaml has it."""
    arguments = {"num_classes": 1001, "pad_type": "same"}
    scales = [ScaleSpec("fine", 3, 7), ScaleSpec("coarse", 4, 7)]
    return load_teacher(
        "mobilenetv2_100",
        model_args=arguments,
        checkpoint=weights,
        random_weights=weights is None,
        image_size=PIXELS,
        scales=scales,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--data", type=Path, help="tars of photographs in place of made pictures")
    command.add_argument("--teacher", type=Path, help="weights of a mobilenetv2_100 with 1,001 classes")
    arguments, (images, rounds) = parse(command, {"images": (16, 2, "pictures a size"), "rounds": (9, 1, "rounds")})
    measure(arguments, images, rounds)


def measure(arguments: argparse.Namespace, images: int, rounds: int) -> None:
    torch.set_num_threads(1)
    load_before, teacher = load(), network(arguments.teacher)
    if arguments.data is not None:
        sets = {"photographs": photographs(arguments.data, images)}
    else:
        sizes = SIZES[1:3] if arguments.quick else SIZES
        sets = {f"{width} x {height}": made(width, height, images) for width, height in sizes}
    cells, figures = [], {"images": float(images), "rounds": float(rounds)}
    for size, files in sets.items():
        figures[f"{size.replace(' ', '_')}/kilobytes_per_image"] = sum(map(len, files)) / len(files) / 1e3
        ways = tasks()
        timings = interleave({name: _on(way, files) for name, way in ways.items()}, rounds)
        reference = ways[REFERENCE](files)
        for name, way in ways.items():
            line, found = row(size, name, timings, len(files), differences(way(files), reference, teacher))
            cells.append(line)
            figures |= found
    columns = ["size: decoder", "CPU ms", "rate / Pillow", "95 % interval", "equal", "levels, most", "mean"]
    table = markdown([*columns, "cosine, mean", "least"], cells)
    report(arguments, machine(("numpy", "torch", "torchvision", "pillow", "timm")), load_before, table, figures)


if __name__ == "__main__":
    main()
