"""`pipe embed`: from a model and a source to files, and what it does about files that are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import write_run
from typer.testing import CliRunner

from pipeline.data.manifest import read_manifest
from pipeline.data.samples import SampleReader
from pipeline.errors import PipeError
from pipeline.evaluation import embed as streaming
from pipeline.models.dinorankclip import load
from pipeline.run_folder import Workspace
from stages import cli, embed


@pytest.fixture
def model(folder: Path) -> str:
    """The path of a run that was not trained, beside the tiny workspace's tars."""
    return str(write_run(folder / "workspace" / "runs" / "first").path)


@pytest.fixture
def source(folder: Path) -> str:
    return str(folder / "tars")


def keys(path: Path) -> list[str]:
    return pq.read_table(path)["key"].to_pylist()


def test_the_rows_are_what_encode_image_gives_for_the_manifests_images(folder: Path, model: str, source: str) -> None:
    out = folder / "all.parquet"
    embed.run(None, model, source, out=out, captions=True, batch_size=10)
    manifest = read_manifest(Workspace(folder / "workspace").manifest)
    table = pq.read_table(out)
    assert table["source"].to_pylist() == manifest.sources().tolist()
    assert table["key"].to_pylist() == manifest.column("key").tolist()
    assert table["captions"].to_pylist() == [manifest.captions(row) for row in range(len(manifest))]
    ours, preprocess, tokenizer = load(model)
    reader = SampleReader(manifest)
    with torch.no_grad():
        images = ours.encode_image(torch.stack([preprocess(reader.image(row)) for row in range(len(manifest))]))
        texts = ours.encode_text(tokenizer(manifest.captions(7)))
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), images.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.array(table["text_embeddings"][7].as_py()), texts.numpy(), atol=2e-6)


def test_a_folder_has_a_file_a_tar_and_goes_on_where_it_stopped(
    folder: Path, model: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls = folder / "parts", []
    real = streaming.embed

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args, **options)

    monkeypatch.setattr(streaming, "embed", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed.run(None, model, source, out=out)
    assert [p.name for p in out.iterdir()] == ["00000.tar.parquet"]
    embed.run(None, model, source, out=out, as_json=True)
    assert len(calls) == 3  # the first tar was there already
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["kept"], said["skipped"], said["node"]) == (48, 1, 0, "gated")
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar.parquet", "00001.tar.parquet"]
    assert keys(out / "00001.tar.parquet") == [f"{n:09d}" for n in range(24, 48)]
    with pytest.raises(PipeError, match="another model, node or kind"):
        embed.run(None, model, source, out=out, node="trunk")
    tar = folder / "tars" / "00000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(10240))  # changed: embedded again
    embed.run(None, model, source, out=out)
    assert len(calls) == 4


def test_nothing_is_overwritten_unless_asked(folder: Path, model: str, source: str) -> None:
    out = folder / "all.npy"
    embed.run(None, model, source, out=out, node="student")
    assert np.load(out).shape == (48, 24)
    with pytest.raises(PipeError, match="--overwrite"):
        embed.run(None, model, source, out=out)
    embed.run(None, model, source, out=out, overwrite=True)
    assert np.load(out).shape == (48, 16)


def test_texts_one_a_line(folder: Path, model: str) -> None:
    (folder / "texts.txt").write_text("a red square\r\n\non the left\n", encoding="utf-8")
    embed.run(None, model, None, texts=folder / "texts.txt", out=folder / "t.parquet")
    table = pq.read_table(folder / "t.parquet")
    assert table["text"].to_pylist() == ["a red square", "", "on the left"]
    ours, _, tokenizer = load(model)
    with torch.no_grad():
        expected = ours.encode_text(tokenizer(table["text"].to_pylist()))
    np.testing.assert_allclose(np.array(table["text_embedding"].to_pylist()), expected.numpy(), atol=2e-6)


def test_an_unreadable_source_is_one_line_and_leaves_nothing(folder: Path, model: str, source: str) -> None:
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jpg").write_bytes(b"no image")
    before = sorted(p.name for p in folder.iterdir())
    refused = [
        ({"source": str(folder / "bad"), "out": folder / "x.npy"}, r"not one image of 1 .*cannot decode.*bad a\.jpg"),
        ({"source": source, "out": folder / "x.csv"}, "no file of embeddings"),
        ({"source": source, "out": folder / "x.npy", "captions": True}, "need a Parquet file"),
        ({"source": source, "out": folder / "x.npy", "node": "global"}, "no node 'global'"),
        ({"source": None}, "name images or texts"),
        ({"source": None, "texts": folder / "gone.txt"}, "no such file"),
        ({"source": None, "texts": folder / "bad" / "a.jpg", "captions": True}, "leave one of the two out"),
    ]
    for options, says in refused:
        with pytest.raises(PipeError, match=says):
            embed.run(None, model, **options)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_the_command_needs_no_config_for_a_path(
    folder: Path, model: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "tars")
    done = CliRunner().invoke(cli.app, ["embed", model, ".", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 48
    assert len(keys(Path("first-embeddings.parquet"))) == 48
