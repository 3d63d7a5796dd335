"""One captioner: what it says is what the library's own generate says; who it is; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_captioners import blip, pictures, said_by_the_library
from transformers import BlipForConditionalGeneration, CLIPConfig

from pipeline.captioning.captioner import DEFAULT_PROMPT, Captioner, CaptionSettings, Refused
from pipeline.errors import PipeError


def captioner(folder: Path, prompt: str | None = None, beams: int = 1, **more: object) -> Captioner:
    return Captioner(str(folder), CaptionSettings(prompt, 8, beams, **more), "cpu")  # type: ignore[arg-type]


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A BLIP, to do anything with."""
    return Path(shutil.copytree(folders["blip"], tmp_path / "captioner"))


@pytest.mark.parametrize(
    ("kind", "prompt", "beams"),
    [
        ("blip", None, 1),
        ("blip", "a dog", 3),
        ("encoder_decoder", None, 1),
        ("encoder_decoder", None, 3),
        ("llava", "what is the cat", 1),
        ("qwen", "a dog", 1),
        ("qwen", "a dog", 3),
    ],
)
def test_captions_are_those_of_the_library_one_image_at_a_time(folders, kind, prompt, beams):
    images = pictures(6)
    found = captioner(folders[kind], prompt, beams)(images)
    how = {"max_new_tokens": 8, "num_beams": beams}
    assert found == [said_by_the_library(kind, folders[kind], image, prompt or "", **how) for image in images]
    assert len(set(found)) > 2  # the image decides


def test_a_batch_of_unequal_prompts_is_padded_before_them(folders):
    """Qwen2-VL: a token for every 16 x 16 pixels. Padding behind the prompt would change what follows."""
    found = captioner(folders["qwen"], "a dog")
    inputs = found._inputs(pictures(6))
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert (inputs["attention_mask"][:, -1] == 1).all()


def test_a_tokenizer_without_a_mark_for_padding_pads_with_the_end(folders, tmp_path):
    """As many language models' do."""
    folder = Path(shutil.copytree(folders["qwen"], tmp_path / "qwen"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "pad_token"}))
    found = captioner(folder, "a dog")
    assert found._tokenizer.pad_token == "[SEP]"
    assert found(pictures(4)) == captioner(folders["qwen"], "a dog")(pictures(4))


def test_models_with_a_chat_template_are_asked_something(folders):
    assert captioner(folders["llava"]).prompt == DEFAULT_PROMPT
    assert captioner(folders["blip"]).prompt is None
    assert captioner(folders["blip"], "").prompt is None


def test_nothing_is_sampled_whatever_the_folder_says(folders, tmp_path):
    folder = Path(shutil.copytree(folders["encoder_decoder"], tmp_path / "captioner"))
    greedy = captioner(folder)(pictures(4))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True, "temperature": 9.0}))
    assert [captioner(folder)(pictures(4)) for _ in range(2)] == [greedy, greedy]


def test_white_space_is_one_blank_and_ends_are_stripped(folders, monkeypatch):
    found = captioner(folders["blip"])
    monkeypatch.setattr(found._tokenizer, "batch_decode", lambda tokens, **_: [" a\n\n red \t dog ", "\u2003"])
    assert found(pictures(2)) == ["a red dog", ""]


def test_an_image_that_the_processor_does_not_take_is_refused_alone(folders):
    """Qwen2-VL takes no picture 200 times as long as it is wide."""
    images = pictures(3)
    found = captioner(folders["qwen"], "a dog")
    alone = found(images)
    odd = found([images[0], Image.new("RGB", (4_100, 20)), *images[1:]])
    assert isinstance(odd[1], Refused)
    assert "aspect ratio" in odd[1].reason
    assert [odd[0], *odd[2:]] == alone
    assert isinstance(found([Image.new("RGB", (4_100, 20))])[0], Refused)


def test_a_processor_that_takes_nothing_is_one_line(folders, monkeypatch):
    found = captioner(folders["blip"])
    monkeypatch.setattr(found, "_inputs", lambda images: {}["text"])
    with pytest.raises(PipeError, match=r"its processor takes no image \(KeyError.*set caption\.prompt"):
        found(pictures(2))


def test_images_that_do_not_go_together_are_one_line_beside_a_refused_one_too(folders, monkeypatch):
    """As where the processor leaves images at their sizes."""
    found = captioner(folders["blip"])

    def unequal(images):
        if len({image.size for image in images}) > 1 or images[0].width == 1:
            raise ValueError("not like this")
        return {}

    monkeypatch.setattr(found, "_inputs", unequal)
    for images in (pictures(3), [*pictures(3), Image.new("RGB", (1, 9))]):
        with pytest.raises(PipeError, match=r"does not take a batch \(ValueError: not like this"):
            found(images)


def test_captions_longer_than_the_model_can_write_name_the_setting(folders):
    long = Captioner(str(folders["encoder_decoder"]), CaptionSettings(max_new_tokens=100), "cpu")
    with pytest.raises(PipeError, match=r"it cannot caption \(.*make caption\.max_new_tokens smaller"):
        long(pictures(2))


def test_the_identity_follows_weights_under_any_name_that_the_index_has(folders, copied):
    BlipForConditionalGeneration.from_pretrained(copied).save_pretrained(copied, max_shard_size="60KB")
    (copied / "model.safetensors").unlink(missing_ok=True)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    shard = max(index["weight_map"].values())
    (copied / shard).rename(copied / "last.safetensors")
    places = {key: "last.safetensors" if place == shard else place for key, place in index["weight_map"].items()}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": places}))
    before = captioner(copied)
    assert before(pictures(2)) == captioner(folders["blip"])(pictures(2))
    weights = load_file(copied / "last.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, copied / "last.safetensors", {"format": "pt"})
    assert captioner(copied).identity.difference(before.identity)


def test_bfloat16_is_a_precision_of_its_own(folders):
    found = captioner(folders["blip"], precision="bfloat16")
    assert all(isinstance(text, str) for text in found(pictures(2)))
    assert found._model.dtype == torch.bfloat16
    assert captioner(folders["blip"]).identity.difference(found.identity) == "precision was 'bfloat16' and is 'float32'"


def test_the_identity_follows_whatever_shapes_captions_and_nothing_else(folders, copied):
    original = captioner(folders["blip"]).identity
    moved = captioner(copied).identity
    assert (moved.name, moved.difference(original)) == ("captioner", None)
    assert moved.architecture == "BlipForConditionalGeneration"
    (copied / "README.md").write_text("anything")
    assert captioner(copied).identity == moved
    for changes, said in [
        ({"prompt": "a dog"}, "prompt was None and is 'a dog'"),
        ({"beams": 2}, "num_beams was 1 and is 2"),
    ]:
        assert captioner(copied, **changes).identity.difference(moved) == said
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        text = (copied / name).read_text()
        (copied / name).write_text(text + "\n")
        assert captioner(copied).identity.difference(moved).startswith("the files of captioner captioner were others")
        (copied / name).write_text(text)
    weights = load_file(copied / "model.safetensors")
    weights["vision_model.post_layernorm.bias"][0] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert captioner(copied).identity.difference(original) == "the captioner was blip and is captioner"


def _without_key(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1_000])


def _other_model(folder: Path) -> None:
    CLIPConfig().save_pretrained(folder)


def _other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))


def _remote_code(folder: Path) -> None:
    code = {"model_type": "surprise", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(code))
    (folder / "code.py").write_text("raise SystemExit('executed')")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), r"there is no such folder, caption\.model"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no model of the transformers library"),
        (lambda folder: (folder / "config.json").write_text("{"), r"holds no model of the transformers library"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"there are no model\*\.safetensors in this folder,"),
        (_pickled, r"no model\*\.safetensors in this folder \(pickled weights are not opened"),
        (_other_model, r"models of type 'clip' write no captions, .*use an image-text-to-text model"),
        (_remote_code, r"models of type 'surprise' write no captions"),
        (_cut, r"cannot load these weights"),
        (_without_key, r"do not fit BlipForConditionalGeneration \(\d missing: .*word_embeddings"),
        (_other_width, r"do not fit BlipForConditionalGeneration \(\d+ of another shape: text_decoder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"no processor that can be used"),
        (lambda folder: (folder / "processor_config.json").unlink(), r"no processor that can be used"),
    ],
)
def test_a_folder_that_will_not_do_is_one_line(copied, damage, said):
    damage(copied)
    with pytest.raises(PipeError, match=said) as caught:
        captioner(copied).load()
    assert "\n" not in str(caught.value)
    assert str(copied) in str(caught.value)


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PipeError, match=r"cannot get this model from the hub.*caption\.model nobody/nothing"):
        captioner(Path("nobody/nothing"))


def test_a_repository_is_used_from_the_hubs_cache_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--someone--tiny"
    folder = blip(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    found = Captioner("someone/tiny", CaptionSettings(max_new_tokens=8), "cpu")
    assert found.identity.name == "someone/tiny"
    assert found(pictures(2)) == captioner(folder)(pictures(2))


def test_what_cannot_be_told_is_not_asked(folders):
    with pytest.raises(PipeError, match="cannot be given a prompt"):
        captioner(folders["encoder_decoder"], "a dog")
