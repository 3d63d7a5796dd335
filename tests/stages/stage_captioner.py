"""One tiny captioner for the tests of the command."""

from __future__ import annotations

from pathlib import Path

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "a", "red", "green", "blue", "square", "left", "right"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_blip(folder: Path) -> Path:
    """A BLIP whose end mark is never said: every image gets a caption, whatever the random weights say of it."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "sep_token": "[SEP]"}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "bos_token_id": 4, "pad_token_id": 0}
    config = hf.BlipConfig(
        vision_config=SIZES | {"image_size": 32, "patch_size": 16},
        text_config=SIZES | text | {"sep_token_id": 3, "eos_token_id": 3, "max_position_embeddings": 32},
    )
    model = hf.BlipForConditionalGeneration(config)
    model.text_decoder.cls.predictions.bias.data[:5] = -100.0  # no mark is ever said
    model.save_pretrained(folder)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    hf.BlipProcessor(hf.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
