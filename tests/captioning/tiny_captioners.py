"""Tiny captioning models with every parameter random, and what the library itself says of an image, one at a time.

Folders as they would be downloaded: BLIP, a vision encoder with a text decoder, and two models with a chat template,
of which Qwen2-VL has more tokens for larger images, so that a batch needs padding. Tokens are whole words.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "a", "red", "blue", "green", "dog", "cat", "runs", "sits", "on", "the", "grass",
    "water", "man", "woman", "child", "ball", "big", "small", "two", "what", "is",
]  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
PAD, BEGIN, END = 0, 4, 3
TURN = (
    "{% for m in messages %}user {% for c in m['content'] %}{% if c['type'] == 'image' %}MARK{% else %} "
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} what is{% endif %}"
)


def tokenizer(marks: tuple[str, ...] = (), *, wraps: bool = False) -> Any:
    """`wraps`: [CLS] before and [SEP] behind every text, as BLIP's has it."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", *marks, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if wraps:
        ends = [("[CLS]", 2), ("[SEP]", END)]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[BOS]", "eos": "[SEP]"}
    named = {f"{name}_token": token for name, token in named.items()}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=list(marks) or None, model_max_length=512, **named
    )


def randomise(model: Any, seed: int, scale: float) -> Any:
    """Every parameter random: what is said depends on the image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def seeded(make: Callable[..., Path]) -> Callable[..., Path]:
    """The library draws first weights from torch's global state: here from the seed, and the state stays as it was."""

    @functools.wraps(make)
    def made(folder: Path, seed: int | None = None) -> Path:
        number = inspect.signature(make).parameters["seed"].default if seed is None else seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return make(folder, number)

    return made


def _text(words: Any, **more: Any) -> dict[str, Any]:
    return {"vocab_size": len(words), "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END, **more}


@seeded
def blip(folder: Path, seed: int = 4) -> Path:
    words = tokenizer(wraps=True)
    text = _text(words, **VISION, encoder_hidden_size=32, max_position_embeddings=64, sep_token_id=END)
    config = hf.BlipConfig(vision_config=VISION | IMAGE, text_config=text)
    randomise(hf.BlipForConditionalGeneration(config), seed, 0.15).save_pretrained(folder)
    hf.BlipProcessor(hf.BlipImageProcessor(size=SQUARE), words).save_pretrained(folder)
    return folder


@seeded
def encoder_decoder(folder: Path, seed: int = 0) -> Path:
    words = tokenizer()
    decoder = hf.GPT2Config(**_text(words), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION, **IMAGE), decoder)
    model = randomise(hf.VisionEncoderDecoderModel(config=config), seed, 0.3)
    model.generation_config = hf.GenerationConfig(
        decoder_start_token_id=BEGIN, pad_token_id=PAD, eos_token_id=END, bos_token_id=BEGIN
    )
    model.save_pretrained(folder)
    hf.ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


LLAMA = {**VISION, "num_key_value_heads": 2, "max_position_embeddings": 256}


@seeded
def llava(folder: Path, seed: int = 0) -> Path:
    words = tokenizer(("<image>",))
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, **IMAGE),
        text_config=hf.LlamaConfig(**_text(words), **LLAMA),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    randomise(hf.LlavaForConditionalGeneration(config), seed, 0.2).save_pretrained(folder)
    hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURN.replace("MARK", "<image>"),
    ).save_pretrained(folder)
    return folder


@seeded
def qwen(folder: Path, seed: int = 0) -> Path:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(marks)
    start, end, image, video = (words.convert_tokens_to_ids(mark) for mark in marks)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    patches = {"patch_size": 8, "temporal_patch_size": 2}
    config = hf.Qwen2VLConfig(
        vision_config={
            **patches,
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
        },
        text_config=_text(words, **LLAMA, rope_parameters=rope),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    randomise(hf.Qwen2VLForConditionalGeneration(config), seed, 0.2).save_pretrained(folder)
    sizes = hf.Qwen2VLImageProcessor(**patches, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64)
    template = TURN.replace("MARK", "".join((marks[0], marks[2], marks[1])))
    hf.Qwen2VLProcessor(sizes, words, hf.Qwen2VLVideoProcessor(), chat_template=template).save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[..., Path]] = {
    "blip": blip,
    "encoder_decoder": encoder_decoder,
    "llava": llava,
    "qwen": qwen,
}


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    """Smooth random pictures of different sizes."""
    out = []
    for number in range(first, first + count):
        coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        out.append(Image.fromarray(coarse).resize((30 + 7 * number, 40 + 3 * number), Image.Resampling.BICUBIC))
    return out


def said_by_the_library(kind: str, folder: Path, image: Image.Image, prompt: str = "", **how: Any) -> str:
    """One image, no padding, no template engine, no automatic class: the words after the prompt."""
    if kind == "encoder_decoder":
        model, words = hf.VisionEncoderDecoderModel, hf.PreTrainedTokenizerFast.from_pretrained(folder)
        inputs = hf.ViTImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    elif kind == "blip":
        model, read = hf.BlipForConditionalGeneration, hf.BlipProcessor.from_pretrained(folder)
        words, inputs = read.tokenizer, read(images=image, return_tensors="pt", **({"text": prompt} if prompt else {}))
    else:
        network = {"llava": (hf.LlavaForConditionalGeneration, hf.LlavaProcessor)}
        model, processor = network.get(kind, (hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor))
        read = processor.from_pretrained(folder)
        mark = "<image>" if kind == "llava" else "<|vision_start|><|image_pad|><|vision_end|>"
        words, inputs = read.tokenizer, read(text=f"user {mark} {prompt} what is", images=image, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.from_pretrained(folder).eval().generate(**inputs, do_sample=False, **how)[0]
    text = words.decode(tokens, skip_special_tokens=True)
    if kind in ("llava", "qwen"):
        before = f"{words.decode(words('user')['input_ids'], skip_special_tokens=True)} {prompt} what is".strip()
        assert text.startswith(before)
        return text.removeprefix(before).strip()
    return text.removeprefix(prompt).strip()
