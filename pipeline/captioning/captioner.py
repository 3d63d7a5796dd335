"""A captioning model of the transformers library, from a local folder or from its hub: images in, a caption each out.

Anything that the library calls an image-text-to-text model (BLIP, GIT, LLaVA, Qwen-VL, SmolVLM ...), and vision
encoders with a text decoder. The model sees the whole image: its own processor resizes it.

Greedy, or beam search: nothing is sampled, whatever the folder's generation_config.json says, so that there is no seed.
A caption may depend in its last bits on which images share its batch (padding, sums in another order).

Legend: B images of a batch, L tokens of the prompt, T tokens in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from pipeline.captioning.folder import (
    FILES,
    config_of,
    files_sha256,
    network_of,
    processors_of,
    refuse_no_weights,
)
from pipeline.data.synthetic_captions import CaptionerIdentity
from pipeline.errors import PipeError
from pipeline.teacher.huggingface_folder import PREFIX, label, local_folder
from pipeline.teacher.huggingface_load import download, quiet, short

Precision = Literal["float32", "bfloat16"]

DEFAULT_PROMPT = "Describe this image in one short sentence."  # for models that are talked to


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are made.

    Args:
        prompt: what the model is asked; None: nothing, or `DEFAULT_PROMPT` where it has a chat template.
        max_new_tokens: where a caption is cut.
        num_beams: 1: greedy.
        precision: of weights and activations; "auto": bfloat16 on a GPU, float32 on a CPU.
        batch_size: images at a time.
    """

    prompt: str | None = None
    max_new_tokens: int = 40
    num_beams: int = 1
    precision: Precision | Literal["auto"] = "auto"
    batch_size: int = 32


class Captioner:
    """A model whose folder has been read; its weights are loaded by `load`, or with the first batch.

    Attributes:
        identity: whose captions these will be.
    """

    def __init__(self, name: str, settings: CaptionSettings, device: torch.device | str | None = None) -> None:
        """Read configuration and processor, and hash all files.

        Args:
            name: a folder, or a repository of the hub; hf: may stand before it.
            device: default the first GPU, else the CPU.

        Raises:
            PipeError: no such folder, no captioning model, no safetensors, no processor.
        """
        where = f"caption.model {name}"
        self.settings, self.name = settings, label(name).removeprefix(PREFIX)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision: Precision = "bfloat16" if self.device.type == "cuda" else "float32"
        if settings.precision != "auto":
            self.precision = settings.precision
        self.folder = local_folder(name) or download(name, FILES, where)
        self.config, self.architecture = config_of(self.folder)
        refuse_no_weights(self.folder)
        self._processor, self._images, self._tokenizer = processors_of(self.folder, self.config)
        self._is_asked = bool(getattr(self._processor, "chat_template", None))
        prompt = settings.prompt if settings.prompt is not None or not self._is_asked else DEFAULT_PROMPT
        if prompt and self._processor is None:
            raise PipeError("this model cannot be given a prompt", where=where, fix="set caption.prompt to null")
        self.prompt = prompt or None
        self.identity = self._identity()
        self._model: Any = None

    def _identity(self) -> CaptionerIdentity:
        import transformers

        settings = self.settings
        return CaptionerIdentity(
            name=self.name,
            architecture=self.architecture,
            files_sha256=files_sha256(self.folder),
            prompt=self.prompt,
            precision=self.precision,
            generation={"max_new_tokens": settings.max_new_tokens, "num_beams": settings.num_beams},
            information={
                "batch_size": settings.batch_size,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )

    def load(self) -> None:
        """Load the weights, unless that was done.

        Raises:
            PipeError: they are broken or do not fit the configuration.
        """
        if self._model is None:
            model = network_of(self.folder, self.architecture, getattr(torch, self.precision))
            try:
                self._model = model.to(self.device)
            except torch.OutOfMemoryError as error:
                fix = "use a smaller model, or set caption.precision to bfloat16"
                raise PipeError("the model does not fit", where=f"{self.device}", fix=fix) from error

    def __call__(self, images: Sequence[Image.Image]) -> list[str | Refused]:
        """Captions of B RGB images, in order: stripped, on one line, "" where the model said nothing.

        Raises:
            PipeError: out of memory, or a model that cannot be used like this.
        """
        self.load()
        with quiet():
            inputs, refused = self._prepared(images)
            captions = iter(self._generated(inputs, len(images) - len(refused)) if inputs is not None else ())
        return [refused[i] if i in refused else next(captions) for i in range(len(images))]

    def _prepared(self, images: Sequence[Image.Image]) -> tuple[Mapping[str, Tensor] | None, dict[int, Refused]]:
        """The model's inputs for all images that its processor takes, and why it does not take the others."""
        try:
            return self._inputs(images), {}
        except Exception as error:  # a strip of one pixel's height, perhaps: each processor has its own bounds
            refused: dict[int, Refused] = {}
            for index, image in enumerate(images):
                try:
                    self._inputs([image])
                except Exception as alone:
                    refused[index] = Refused(short(alone))
            if not refused:
                raise self._unusable("its processor does not take a batch", short(error)) from error
        if len(refused) == len(images) and not self._takes_anything():
            raise self._unusable("its processor takes no image", refused[0].reason)
        usable = [image for index, image in enumerate(images) if index not in refused]
        try:
            return (self._inputs(usable) if usable else None), refused
        except Exception as error:  # each of them alone, but not together
            raise self._unusable("its processor does not take a batch", short(error)) from error

    def _takes_anything(self) -> bool:
        """Whether the processor takes an ordinary image: if not, it is no fault of the images."""
        try:
            self._inputs([Image.new("RGB", (64, 64))])
        except Exception:
            return False
        return True

    def _unusable(
        self, what: str, reason: str, fix: str = "set caption.prompt (some models need one), or use another model"
    ) -> PipeError:
        return PipeError(f"{what} ({reason})", where=f"caption.model {self.name}", fix=fix)

    def _inputs(self, images: Sequence[Image.Image]) -> Mapping[str, Tensor]:
        """What the processor makes of B images and the prompt: pixel_values and more; on the CPU."""
        if self._processor is None:
            return dict(self._images(images=list(images), return_tensors="pt"))
        if not self._is_asked:
            text = {} if self.prompt is None else {"text": [self.prompt] * len(images), "padding": True}
            return dict(self._processor(images=list(images), return_tensors="pt", **text))
        said = [] if self.prompt is None else [{"type": "text", "text": self.prompt}]
        talks = [[{"role": "user", "content": [{"type": "image", "image": image}, *said]}] for image in images]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(self._processor.apply_chat_template(talks, processor_kwargs={"padding": True}, **options))

    @torch.inference_mode()
    def _generated(self, inputs: Mapping[str, Tensor], count: int) -> list[str]:
        """The captions of `count` prepared images."""
        prompt = inputs.get("input_ids")  # (B, L), where the output (B, T) repeats it
        how = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}
        try:
            tokens = self._model.generate(**self._moved(inputs), **how, **self.identity.generation).cpu()
        except torch.OutOfMemoryError as error:
            raise PipeError(
                f"a batch of {count} images does not fit on {self.device}",
                where="caption.batch_size",
                fix="make it smaller",
            ) from error
        except Exception as error:  # whatever a model does not like
            fix = "set caption.prompt (some models need one), make caption.max_new_tokens smaller, or use another model"
            raise self._unusable("it cannot caption", short(error), fix) from error
        if prompt is not None and not self._model.config.is_encoder_decoder:
            tokens = tokens[:, _repeated(prompt, tokens) :]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs on the model's device, numbers in its precision; copies, since some models write into them."""
        out = {}
        for key, value in inputs.items():
            dtype = self._model.dtype if isinstance(value, Tensor) and value.is_floating_point() else None
            out[key] = value.to(self.device, dtype, copy=True) if isinstance(value, Tensor) else value
        return out


@dataclass(frozen=True)
class Refused:
    """Why the model's processor does not take an image."""

    reason: str


def _repeated(prompt: Tensor, tokens: Tensor) -> int:
    """How many leading tokens (B, T) are the prompt's (B, L): all, all but its last (BLIP cuts its end mark), or none.

    The first is not compared: BLIP puts its own mark there.
    """
    for length in (prompt.shape[1], prompt.shape[1] - 1):
        if length <= tokens.shape[1] and torch.equal(prompt[:, 1:length], tokens[:, 1:length]):
            return length
    return 0
