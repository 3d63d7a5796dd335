"""Embedding streams: order, caching, damage, broken images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from colour_world import Broken, ColourModel, jpeg

from pipeline.data.samples import SampleError, decode_image
from pipeline.errors import PipeError
from pipeline.evaluation.embeddings import loaded_batches


class Memory:
    """Images in memory; `bad` ones cannot be decoded."""

    def __init__(self, n: int, bad: tuple[int, ...] = (), digest: str = "images") -> None:
        self.data = [b"no image" if k in bad else jpeg((10 * k, 100, 200 - 5 * k), k) for k in range(n)]
        self.digest = digest

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: int):
        return decode_image(self.data[index])


def test_vectors_are_unit_norm_in_order_and_equal_to_one_by_one(embedder):
    images = Memory(17)
    found, ok = embedder().images(images, "test")
    assert ok.all()
    np.testing.assert_allclose(np.linalg.norm(found["trunk"], axis=1), 1, atol=1e-6)
    one, _ = embedder(digest="other", batch_size=1, workers=1).images(images, "test")
    np.testing.assert_allclose(found["trunk"], one["trunk"], atol=1e-6)
    assert len(np.unique(found["trunk"].round(4), axis=0)) == 17


def test_the_number_of_threads_changes_nothing(embedder):
    images = Memory(40)
    runs = [embedder(digest=str(n), workers=n).images(images, "test")[0]["trunk"] for n in (1, 2, 8)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_a_second_call_reads_the_store_and_loads_no_model(embedder, tmp_path):
    images = Memory(9)
    first, _ = embedder().images(images, "test")
    texts = embedder().texts(["red", "a blue one"], "test")

    def never():
        raise AssertionError("the model was loaded")

    again = embedder(Broken())
    again._load = never
    second, _ = again.images(images, "test")
    np.testing.assert_array_equal(first["trunk"], second["trunk"])
    np.testing.assert_array_equal(texts["trunk"], again.texts(["red", "a blue one"], "test")["trunk"])
    assert not list(tmp_path.rglob("*.pkl"))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("change", ["model", "data", "preprocess", "texts"])
def test_another_model_data_or_preprocessing_is_computed_anew(embedder, change):
    model = ColourModel()
    embedder(model).images(Memory(5), "test")
    embedder(model).texts(["red"], "test")
    before = model.calls
    if change == "texts":
        embedder(model).texts(["blue"], "test")
    else:
        other = embedder(
            model, digest="e" if change == "model" else "d", preprocess="p" if change == "preprocess" else ""
        )
        other.images(Memory(5, digest="others" if change == "data" else "images"), "test")
    assert model.calls == before + 1


def test_broken_images_are_counted_masked_and_logged(embedder, caplog, monkeypatch):
    monkeypatch.setattr("pipeline.console.log.propagate", True)
    found, ok = embedder().images(Memory(10, bad=(0, 6)), "holes")
    np.testing.assert_array_equal(np.flatnonzero(~ok), [0, 6])
    assert (found["trunk"][[0, 6]] == 0).all()
    assert "holes: 2 of 10 images cannot be decoded" in caplog.text


def test_not_one_good_image_is_an_error_that_names_the_data(embedder):
    with pytest.raises(PipeError, match="not one image can be decoded, dead"):
        embedder().images(Memory(3, bad=(0, 1, 2)), "dead")


def test_a_damaged_store_file_is_computed_again(embedder, tmp_path):
    images = Memory(6)
    first, _ = embedder().images(images, "test")
    (kept,) = (tmp_path / "store" / "images").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:50])
    model = ColourModel()
    second, _ = embedder(model).images(images, "test")
    assert model.calls == 1
    np.testing.assert_array_equal(first["trunk"], second["trunk"])


def test_a_model_that_is_training_is_evaluated_in_eval_mode(embedder):
    class Dropping(ColourModel):
        def encode_image(self, images, normalize=False):
            assert not self.training
            return super().encode_image(images)

    embedder(Dropping().train()).images(Memory(2), "test")


def test_texts_of_a_model_without_tokenizer_are_refused(embedder):
    made = embedder()
    made._encoder = replace(made.encoder, tokenizer=None)
    with pytest.raises(PipeError, match="reads no texts"):
        made.texts(["red"], "test")


def test_errors_that_are_no_broken_image_are_not_swallowed():
    class Failing(Memory):
        def load(self, index):
            raise MemoryError("no memory")

    with pytest.raises(MemoryError):
        list(loaded_batches(Failing(3), lambda image: torch.zeros(1), 2, 2))
    assert not issubclass(MemoryError, SampleError)


def test_vectors_that_are_not_finite_are_refused(embedder):
    """No comparison with NaN is true: such a model would otherwise rank everything first."""

    class Exploded(ColourModel):
        def encode_image(self, images, normalize=False):
            return super().encode_image(images) * float("nan")

    with pytest.raises(PipeError, match="node trunk gives vectors that are not finite"):
        embedder(Exploded()).images(Memory(3), "test")
