"""Random access: bytes as they lie in the source, decoding to RGB, in threads, forked and spawned processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tar_samples import image, pixels, sample, samples, write_tar

from pipeline.data import samples as samples_module
from pipeline.data.index import build_manifest
from pipeline.data.manifest import read_manifest
from pipeline.data.samples import ImageTooLarge, SampleChanged, SampleError, SampleReader, decode_image
from pipeline.errors import PipeError


@pytest.fixture
def folder(tmp_path):
    """Three tars of four samples, and a manifest of them."""
    for n in range(3):
        write_tar(tmp_path / "tars" / f"{n:05d}.tar", samples(4 * n, 4))
    build_manifest(str(tmp_path / "tars"), tmp_path / "manifest.parquet", workers=1)
    return tmp_path


@pytest.fixture
def reader(folder):
    return SampleReader(read_manifest(folder / "manifest.parquet"))


def test_every_row_reads_what_tarfile_reads(folder, reader):
    row = 0
    for path in sorted((folder / "tars").iterdir()):
        with tarfile.open(path) as tar:
            for name in sorted(name for name in tar.getnames() if name.endswith(".jpg")):
                jpg, txt = (tar.extractfile(name[:-3] + kind).read() for kind in ("jpg", "txt"))
                assert reader.image_bytes(row) == jpg
                assert reader.raw(row) == (jpg, txt)
                found, captions = reader.read(row)
                assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB")))
                assert captions == [txt.decode()]
                row += 1
    assert row == len(reader.manifest) == 12


def test_image_and_caption_come_from_one_read(reader, monkeypatch):
    reader.image_bytes(5)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    reader.raw(5)
    assert len(reads) == 1


def test_members_far_apart_are_read_one_by_one(tmp_path):
    filler = [("z.bin", os.urandom(samples_module.CLOSE_ENOUGH + 512))]
    write_tar(tmp_path / "tars" / "0.tar", [("a.jpg", image(1)), *filler, ("a.txt", b"far")])
    build_manifest(str(tmp_path / "tars"), tmp_path / "m.parquet", workers=1)
    assert SampleReader(read_manifest(tmp_path / "m.parquet")).raw(0) == (image(1), b"far")


def test_few_open_files_suffice_for_many_tars_and_threads(folder):
    reader = SampleReader(read_manifest(folder / "manifest.parquet"), max_open=1)
    expected = [image(n) for n in range(12)]
    rows = np.random.default_rng(0).integers(0, 12, 400).tolist()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.image_bytes, rows)) == [expected[row] for row in rows]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_in_use_works_on_in_other_processes(reader, method):
    reader.read(0)  # a file is open and captions are loaded when the process starts
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        for row, (found, captions) in zip((0, 11), pool.map(reader.read, (0, 11)), strict=True):
            assert np.array_equal(np.asarray(found), np.asarray(reader.image(row)))
            assert captions == reader.captions(row)


def test_a_fork_while_another_thread_opens_a_file_does_not_hang_the_child(reader):
    context = multiprocessing.get_context("fork")
    with reader._lock:  # as another thread may at that moment
        child = context.Process(target=lambda: reader.image_bytes(0) == image(0) or os._exit(1))
        child.start()
        child.join(30)
        hung = child.is_alive()
        if hung:
            child.kill()
    assert not hung
    assert child.exitcode == 0


def test_a_reader_pickles_small_and_without_open_files(reader):
    reader.read(3)
    data = pickle.dumps(reader)
    assert len(data) < 2_000
    assert pickle.loads(data).image_bytes(3) == reader.image_bytes(3)


def test_rows_without_a_good_image_raise_sample_errors(tmp_path):
    members = [("a.txt", b"x"), ("b.jpg", image(1)[:-40]), ("b.txt", b"x"), *sample("c", 2)]
    write_tar(tmp_path / "tars" / "0.tar", members)
    build_manifest(str(tmp_path / "tars"), tmp_path / "m.parquet", workers=1)
    reader = SampleReader(read_manifest(tmp_path / "m.parquet"))
    with pytest.raises(SampleError, match="row 0 has no image"):
        reader.image(0)
    with pytest.raises(SampleError, match="cannot decode"):
        reader.image(1)
    assert reader.image_bytes(1) == image(1)[:-40]
    with pytest.raises(IndexError):
        reader.image(3)
    with pytest.raises(IndexError):
        reader.image(-1)


def test_a_source_that_changed_or_went_is_named(folder):
    manifest = read_manifest(folder / "manifest.parquet")
    path = folder / "tars" / "00001.tar"
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(PipeError, match=r"changed since it was indexed, .*00001\.tar; .*pipe index"):
        SampleReader(manifest).image(4)
    path.unlink()
    with pytest.raises(PipeError, match=r"cannot open a source.*00001\.tar"):
        SampleReader(manifest).image(4)
    assert SampleReader(manifest).image(0).size == (16, 12)


def test_a_tables_image_that_changed_or_went_is_one_bad_sample(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(image(n, "PNG"))
    (tmp_path / "t.csv").write_text("filepath,title\n0.png,zero\n1.png,one\n2.png,two\n")
    build_manifest(str(tmp_path / "t.csv"), tmp_path / "m.parquet", workers=1)
    reader = SampleReader(read_manifest(tmp_path / "m.parquet"))
    assert np.array_equal(np.asarray(reader.image(1)), pixels(1))
    assert reader.raw(1) == (image(1, "PNG"), b"")
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").write_bytes(image(2, "PNG") + b"more")
    with pytest.raises(SampleError, match=r"cannot read 0\.png"):
        reader.image(0)
    with pytest.raises(SampleError, match=r"2\.png.*changed"):
        reader.image(2)


def test_another_image_of_the_same_size_is_not_taken_for_the_indexed_one(tmp_path):
    """In a tar whose time of change is another; and, where asked, whatever its time says."""
    folder = tmp_path / "tars"
    folder.mkdir()
    plain, other = (encoded(Image.new("RGB", (8, 8), colour), "PNG", compress_level=0) for colour in ("red", "blue"))
    assert len(plain) == len(other)

    def pack(data: bytes, seconds: int) -> None:
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name, content in (("a.png", data), ("a.txt", b"a square")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        os.utime(folder / "0.tar", (seconds, seconds))

    pack(plain, 1_000)
    build_manifest(str(folder), tmp_path / "m.parquet", workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    assert manifest.record(0).status == "ok"
    os.utime(folder / "0.tar", (2_000, 2_000))
    assert SampleReader(manifest).image(0).getpixel((0, 0)) == (255, 0, 0)  # a copy of the same tar
    pack(other, 2_000)
    with pytest.raises(SampleChanged, match="changed since it was indexed"):
        SampleReader(manifest).image(0)
    pack(other, 1_000)
    with pytest.raises(SampleChanged, match="changed since it was indexed"):
        SampleReader(manifest, verify=True).image(0)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG")))
    assert got.shape == (8, 8, 3)
    assert np.array_equal(got[..., 0], values // 257)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_decodes_to_rgb(mode):
    picture = Image.fromarray(pixels(3)).convert(mode)
    got = decode_image(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert got.mode == "RGB"
    assert got.size == picture.size
    if mode in ("L", "RGBA"):
        assert np.array_equal(np.asarray(got), np.asarray(picture.convert("RGB")))


def test_exif_orientation_is_ignored_so_that_sizes_are_those_stored():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me"
    assert decode_image(encoded(Image.fromarray(pixels(1)), "JPEG", exif=exif)).size == (16, 12)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(pixels(n)) for n in (1, 2)]
    got = decode_image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert np.array_equal(np.asarray(got), pixels(1))


def test_only_the_listed_formats_are_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    for data in (postscript, encoded(Image.fromarray(pixels(1)), "PPM")):  # Pillow itself would open both
        with pytest.raises(SampleError, match="cannot decode: no JPEG"):
            decode_image(data)


def test_too_large_is_told_apart_from_broken(monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ImageTooLarge):
        decode_image(image(0))


def test_running_out_of_memory_is_no_property_of_the_image(monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(samples_module, "_to_rgb", full)
    with pytest.raises(MemoryError):
        decode_image(image(0))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_of_torchvisions_decoder_and_live_on_alone(subsampling, progressive):
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    rng = np.random.default_rng(subsampling)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((93, 61))
    out = io.BytesIO()
    smooth.save(out, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
    image = decode_image(out.getvalue())
    want = decode_jpeg(torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8), mode=ImageReadMode.RGB)
    np.testing.assert_array_equal(np.asarray(image), want.permute(1, 2, 0).numpy())
    plain = Image.fromarray(np.asarray(image))  # what a view is cut from is no longer a file
    for work in (lambda x: x.resize((20, 20)), lambda x: x.crop((3, 4, 30, 40)), lambda x: x.convert("L")):
        np.testing.assert_array_equal(np.asarray(work(image)), np.asarray(work(plain)))
