"""Embeddings as they are written: whole files or none, groups of rows, and no more in memory than two batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from colour_world import COLOURS, NAMES, NodeModel, jpeg, preprocess, tokenizer

from pipeline.data.pictures import Picture
from pipeline.errors import PipeError
from pipeline.evaluation import embedding_files
from pipeline.evaluation.embed import NodeEncoder, embed
from pipeline.evaluation.embedding_files import about_of, beside, write_text_vectors, writing
from pipeline.evaluation.embeddings import Encoder


class Model(NodeModel):
    """`image_size` is asked of a model's trunk."""

    trunk = type("Trunk", (), {"image_size": 16})()


def encoder(node: str | None = None) -> NodeEncoder:
    return NodeEncoder.of(Encoder(Model(), preprocess, tokenizer), node, torch.device("cpu"))


def picture(number: int, read: Any = None) -> Picture:
    name = NAMES[number % 3]
    data = jpeg(COLOURS[name], number)
    return Picture("t.tar", f"{number:03d}", read or (lambda: data), (f"a {name} thing", name)[: number % 3])


def written(path: Path, pictures: Any, *, node: str | None = None, captions: bool = False, **options: Any) -> Any:
    chosen = encoder(node)
    with writing(path, width=chosen.width, about={"model": "m"}, captions=captions) as writer:
        embed(chosen, pictures, writer, captions=captions, **{"batch_size": 4, "workers": 2, **options})
    return chosen


def test_rows_are_the_models_vectors_in_order_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_files, "GROUP_ROWS", 5)
    path = tmp_path / "a.parquet"
    pictures = [picture(n) for n in range(11)]
    chosen = written(path, pictures, node="trunk", captions=True)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)] == [8, 3]
    table = file.read()
    assert table["key"].to_pylist() == [p.key for p in pictures]
    assert table["captions"].to_pylist() == [list(p.captions) for p in pictures]
    from pipeline.data.samples import decode_image

    pixels = torch.stack([preprocess(decode_image(p.read())) for p in pictures])
    expected = torch.nn.functional.normalize(chosen.encoder.model.image_nodes(pixels)["trunk"], dim=-1)
    got = np.stack(table["embedding"].to_pylist())
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-6)
    for p, vectors in zip(pictures, table["text_embeddings"].to_pylist(), strict=True):
        assert len(vectors) == len(p.captions)
        for text, vector in zip(p.captions, vectors, strict=True):
            same = torch.nn.functional.normalize(chosen.encoder.model.encode_text(tokenizer([text])), dim=-1)[0]
            np.testing.assert_allclose(vector, same.numpy(), atol=1e-6)
    assert about_of(path) == {"model": "m", "rows": 11, "skipped": 0}


def test_npy_holds_the_same_rows_and_its_keys_lie_beside(tmp_path: Path) -> None:
    pictures = [picture(n) for n in range(9)]
    written(tmp_path / "a.npy", pictures)
    written(tmp_path / "b.parquet", pictures)
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    table = pq.read_table(tmp_path / "b.parquet")
    assert (array.dtype, array.shape) == (np.float32, (9, 3))
    assert np.array_equal(array, np.array(table["embedding"].to_pylist(), np.float32))
    keys = [json.loads(line) for line in beside(tmp_path / "a.npy", "keys").read_text().splitlines()]
    assert keys == table.select(["source", "key"]).to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_broken_images_are_listed_and_the_others_keep_their_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    spoilt = {1, 4, 5, 6, 7}  # the second batch as a whole
    pictures = [picture(n, (lambda: b"no image") if n in spoilt else None) for n in range(9)]
    written(path, pictures)
    listed = [json.loads(line) for line in beside(path, "skipped").read_text().splitlines()]
    assert [line["key"] for line in listed] == [f"{n:03d}" for n in sorted(spoilt)]
    assert all("cannot decode" in line["problem"] for line in listed)
    rows = np.load(path) if suffix == ".npy" else pq.read_table(path)["embedding"].to_pylist()
    written(tmp_path / f"b{suffix}", [picture(n) for n in range(9) if n not in spoilt])
    other = tmp_path / f"b{suffix}"
    alone = np.load(other) if suffix == ".npy" else pq.read_table(other)["embedding"].to_pylist()
    np.testing.assert_allclose(np.array(rows), np.array(alone), atol=1e-6)
    assert not beside(other, "skipped").exists()
    written(path, [picture(0)])  # nothing is skipped now: an old list would tell of another file
    assert not beside(path, "skipped").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, PipeError("stop")])
def test_an_end_on_the_way_leaves_nothing(tmp_path: Path, suffix: str, error: Any) -> None:
    def pictures() -> Iterator[Picture]:
        yield from (picture(n) for n in range(10))
        raise error

    with pytest.raises((KeyboardInterrupt, PipeError)):
        written(tmp_path / f"a{suffix}", pictures())
    assert list(tmp_path.iterdir()) == []


def test_no_more_than_three_batches_are_read_ahead_of_what_is_written(tmp_path: Path) -> None:
    read, done, furthest = 0, 0, 0

    def pictures() -> Iterator[Picture]:
        nonlocal read
        for n in range(80):
            read += 1
            yield picture(n)

    def count(looked_at: int) -> None:
        nonlocal done, furthest
        furthest = max(furthest, read - done)
        done += looked_at

    written(tmp_path / "a.npy", pictures(), on_batch=count)
    assert done == 80
    assert furthest <= 3 * 4


def test_nodes_are_those_the_model_has(tmp_path: Path) -> None:
    assert encoder().node == "gated"
    with pytest.raises(PipeError, match=r"no node 'student'.*it has trunk, gated"):
        encoder("student")
    with pytest.raises(PipeError, match=r"\.parquet or \.npy"):
        written(tmp_path / "a.csv", [picture(0)])


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    chosen = encoder()
    chosen.encoder.model.image_nodes = lambda images: {"gated": torch.full((len(images), 3), torch.nan)}
    with (
        pytest.raises(PipeError, match="not finite"),
        writing(tmp_path / "a.npy", width=3, about={}) as writer,
    ):
        embed(chosen, [picture(0)], writer)
    assert list(tmp_path.iterdir()) == []


def test_texts_keep_their_lines(tmp_path: Path) -> None:
    texts = ["a red thing", "", *itertools.repeat("blue", 5)]
    chosen = encoder()
    vectors = chosen.texts(texts, batch_size=3)
    assert np.array_equal(vectors, chosen.texts(texts, batch_size=100))
    write_text_vectors(tmp_path / "t.parquet", texts, vectors, {"model": "m"})
    write_text_vectors(tmp_path / "t.npy", texts, vectors, {})
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["text"].to_pylist() == texts
    assert np.array_equal(np.array(table["text_embedding"].to_pylist(), np.float32), np.load(tmp_path / "t.npy"))
