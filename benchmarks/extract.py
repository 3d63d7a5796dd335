"""What does stage one cost beside the teacher itself?

Two tasks in turns, on the same pictures, with as many threads:

    bare forward    the teacher alone, on decoded and normalised tensors that are in memory already
    stage one       `pipe extract-teacher` as it is: read from the tar, check the hash, decode, resize, normalise,
                    forward, project, quantise, checksum, write, sync

The teacher is a DINOv3 ViT-S (timm's `vit_small_patch16_dinov3_qkvb`, random weights: they cost what real ones cost)
at 224 pixels in float32 on a CPU, in bfloat16 on a GPU; scales and PCA as in configs/cc3m.yaml. The pictures are made
here (JPEG, 500 x 375 pixels), or photographs with --data.

A shard is one round; the calibration is not timed. Rate is images per second of wall time.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Timing, interleave, load, machine, markdown, parse, parser, report
from PIL import Image

from pipeline.cache.layout import ScaleSpec
from pipeline.data.index import build_manifest
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.samples import SampleReader
from pipeline.data.views import Preprocess, View
from pipeline.teacher.extract import Settings, extract
from pipeline.teacher.feed import CPU_IMAGES
from pipeline.teacher.teacher import Teacher, load_teacher

NAME = "vit_small_patch16_dinov3_qkvb"
SIZES = {False: (224, (14, 7, 7)), True: (64, (4, 2, 2))}  # --quick → pixels, grids of the scales
PICTURE = (500, 375)
CALIBRATION = 24


def make_tar(folder: Path, count: int) -> Path:
    """Smooth random pictures with some grain, which compress about as photographs do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(PICTURE, Image.Resampling.BICUBIC), np.int16)
            grain = rng.normal(0, 6, smooth.shape).astype(np.int16)
            data = io.BytesIO()
            Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
            for suffix, content in (("jpg", data.getvalue()), ("txt", f"picture {number}".encode())):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def decoded(manifest: Manifest, teacher: Teacher, rows: int, device: torch.device) -> torch.Tensor:
    """(rows, 3, S, S) float32, normalised: what the bare forward starts from."""
    preprocess, reader = Preprocess(View("crop", teacher.image_size), teacher.mean, teacher.std), SampleReader(manifest)
    return torch.stack([preprocess(reader.image(row)) for row in range(rows)]).to(device)


def tabulate(timings: dict[str, Timing], images: int) -> tuple[str, dict[str, float]]:
    bare, figures, cells = timings["bare forward"], {}, []
    for name, timing in timings.items():
        rate, ratio = images / timing.median(), 1 / timing.ratio(bare)
        cpu, cpu_ratio = timing.median("cpu") / images * 1e3, timing.ratio(bare, "cpu")
        key = name.replace(" ", "_")
        figures |= {f"{key}/images_per_second": rate, f"{key}/ratio_of_rate_to_bare_forward": ratio}
        figures |= {f"{key}/cpu_milliseconds_per_image": cpu, f"{key}/ratio_of_cpu_time_to_bare_forward": cpu_ratio}
        cells.append([name, f"{rate:.2f}", f"{ratio:.3f}", f"{cpu:.1f}", f"{cpu_ratio:.3f}", str(len(timing.wall))])
    columns = ["task", "images/s", "rate / bare", "CPU ms an image", "CPU / bare", "rounds"]
    return markdown(columns, cells), figures


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--data", type=Path, help="tars of photographs in place of the made pictures")
    command.add_argument("--workers", default="auto", help="decoding threads (auto: one a core)")
    arguments, (images, rounds) = parse(command, {"images": (128, 4, "images a round"), "rounds": (7, 1, "rounds")})
    measure(arguments, images, rounds)


def measure(arguments: argparse.Namespace, images: int, rounds: int) -> None:
    load_before = load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    at_once = CPU_IMAGES if device.type == "cpu" else 256
    pixels, grids = SIZES[arguments.quick]
    scales = [ScaleSpec(*spec) for spec in zip(("fine", "mid", "coarse"), (-1, 8, 4), grids, strict=True)]
    teacher = load_teacher(NAME, random_weights=True, image_size=pixels, scales=scales).to(device)
    with tempfile.TemporaryDirectory(prefix="extract.") as name:
        folder = Path(name)
        source = arguments.data or make_tar(folder / "tars", images * (rounds + 1) + 2 * CALIBRATION)
        build_manifest(str(source), folder / "manifest.parquet", val_fraction=0.01)
        manifest = read_manifest(folder / "manifest.parquet")
        if len(manifest) < images * (rounds + 1):
            raise SystemExit(f"--data has {len(manifest)} images; {images * (rounds + 1)} are needed")
        workers = arguments.workers if arguments.workers == "auto" else int(arguments.workers)
        settings = Settings(calibration_rows=CALIBRATION, shard_rows=images, workers=workers)
        extract(manifest, teacher, folder / "t.zarr", settings, shards=[])  # calibrates
        tensors = decoded(manifest, teacher, images, device)
        precision = torch.bfloat16 if device.type == "cuda" else None

        def bare(_: int) -> None:
            with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision is not None):
                for batch in tensors.split(at_once):
                    teacher(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()

        def stage_one(index: int) -> None:
            done = extract(manifest, teacher, folder / "t.zarr", settings, shards=[index])
            assert done.rows == images

        timings = interleave({"bare forward": bare, "stage one": stage_one}, rounds)
    table, figures = tabulate(timings, images)
    figures |= {"images": images, "threads": torch.get_num_threads()}
    described = f"{machine(('numpy', 'torch', 'timm', 'pillow'))}; {device}, {torch.get_num_threads()} threads"
    report(arguments, described, load_before, table, figures)


if __name__ == "__main__":
    main()
