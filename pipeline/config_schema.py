"""The keys of the YAML that describes an experiment, their types, bounds and defaults (pydantic)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.data.geometry import ViewSpec

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rgb = tuple[float, float, float]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)


Source = Annotated[str, Field(min_length=1)]  # an empty one would read as the current folder


Interval = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


def _ascending(interval: Interval) -> Interval:
    if interval[0] > interval[1]:
        raise ValueError(f"the first of {list(interval)} is the larger one")
    return interval


OneShare = Annotated[float, Field(gt=0, le=1)]
Area = Annotated[tuple[OneShare, OneShare], AfterValidator(_ascending)]


class CropConfig(Section):
    """How boxes are drawn: the share of the picture's area, and the ratio of width to height."""

    area: Area = (0.5, 1.0)
    aspect: Annotated[Interval, AfterValidator(_ascending)] = (0.75, 1.3333)


class RoiConfig(CropConfig):
    """Crops of the view that everyone has, another one in every epoch; see data.roi."""

    area: Area = (0.75, 1.0)

    @model_validator(mode="before")
    @classmethod
    def _no_flips(cls, values: Any) -> Any:
        if isinstance(values, dict) and "flip" in values:
            raise ValueError("a mirrored map is not the map of the mirrored image: flips are for teacher.views")
        return values


class DataConfig(Section):
    source: Source | None = None
    val_source: Source | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    view: Literal["crop", "squash"] = "crop"
    rows: Literal["all", "cached"] = "all"
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    shuffle: Literal["full", "shards"] = "full"
    shuffle_buffer: Positive = 8  # shards that `shuffle: shards` mixes
    cache: Source | None = None  # the teacher cache to read, a folder or a URL; null: workspace/teacher.zarr
    cache_access: Literal["auto", "map", "read"] = "auto"  # auto: positioned reads on network disks, else memory maps
    permute_targets: bool = False  # the control `shuffled-cache`
    second_caption: Literal["synthetic", "another"] = (
        "synthetic"  # ALIP's: of `pipe caption`, or another of the row's own
    )
    roi: RoiConfig | None = None  # crops of the one stored view, with targets that are approximate


# Arrays that every cache has.
TAKEN = {"global", "state", "saturated", "seals", "calibration_rows", "heldout_rows", "views", "geometry"}


class ScaleConfig(Section):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    layer: int
    grid: Positive

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in TAKEN or name.endswith(("_steps", "_basis", "_mean")):
            raise ValueError("this name is used by the cache itself")
        return name


class ViewConfig(CropConfig):
    """A further view that the teacher looks at and the cache stores."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    flip: Share = 0.5

    @field_validator("name")
    @classmethod
    def _not_the_base(cls, name: str) -> str:
        if name == "base":
            raise ValueError("base is the view that everyone has")
        return name


def _default_scales() -> list[ScaleConfig]:
    return [
        ScaleConfig(name="fine", layer=-1, grid=14),
        ScaleConfig(name="mid", layer=8, grid=7),
        ScaleConfig(name="coarse", layer=4, grid=7),
    ]


class TeacherConfig(Section):
    name: str = "vit_base_patch16_dinov3.lvd1689m"
    model_args: dict[str, Any] = {}
    checkpoint: Path | None = None
    random_weights: bool = False
    mean: Rgb | None = None
    std: Rgb | None = None
    calibration_rows: Positive = 8192
    image_size: Positive = 224
    batch_size: Positive = 256
    pca: Positive | None = 256
    dtype: Literal["int8", "int8_token", "float16"] = "int8"
    scales: Annotated[list[ScaleConfig], Field(min_length=1)] = Field(default_factory=_default_scales)
    views: list[ViewConfig] = []
    compile: bool = False  # torch.compile
    online: bool = False  # pipe train runs the teacher in the loop, to compare with a cache or to check it
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        names = [scale.name for scale in self.scales]
        if len(set(names)) < len(names):
            raise ValueError(f"two scales share a name: {', '.join(names)}")
        views = [view.name for view in self.views]
        if len(set(views)) < len(views):
            raise ValueError(f"two views share a name: {', '.join(views)}")
        if self.random_weights and self.checkpoint is not None:
            raise ValueError("random_weights and checkpoint exclude each other: remove one")
        if self.name.startswith("hf:") and (self.checkpoint is not None or self.model_args):
            raise ValueError("checkpoint and model_args are for timm's networks: the folder of hf:... says it all")
        return self

    @property
    def view_specs(self) -> list[ViewSpec]:
        """The further views as the pipeline takes them."""
        return [ViewSpec(view.name, view.area, view.aspect, view.flip) for view in self.views]


class StudentConfig(Section):
    name: str = "vit_tiny_patch16_224"
    patch: Positive = 16
    depth: Positive = 12
    stem: Literal["patch", "conv"] = "patch"  # pixels to tokens: the ViT's own map, or strided convolutions
    pool: Literal["token", "avg"] = "token"  # what predicts `global`: the class token, or the mean of the patches
    lr_scale: Annotated[float, Field(gt=0)] = 1.0  # its rate and its losses' heads', over train.lr
    text_width: Positive = 256
    text_layers: Positive = 2


class PartsConfig(Section):
    """Which parts exist; set by configs/fusion/*.yaml."""

    student: bool = True
    pyramid: bool = True
    attention: bool = True
    refiner: bool = True
    text_side: bool = True
    gate: bool = True


class GateConfig(Section):
    hidden: Positive = 128


class ModelConfig(Section):
    trunk: str | dict[str, Any] = "RN50"
    image_size: Positive = 224
    init: Path | None = None  # a run's folder, an exported model, or an open_clip checkpoint to start from
    freeze_trunk: bool = False  # only what is added to the trunk learns
    student: StudentConfig = StudentConfig()
    fusion: str = "full"
    parts: PartsConfig = PartsConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _something_learns(self) -> ModelConfig:
        if self.freeze_trunk and not self.parts.student:
            raise ValueError(
                f"freeze_trunk with fusion {self.fusion} leaves nothing that could learn: choose another fusion, or "
                "freeze_trunk: false"
            )
        return self


class ExplosionConfig(Section):
    """When a finite loss ends a run: above `factor` times its running median in `steps` steps in a row."""

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10.0
    steps: Positive = 20


class DdpConfig(Section):
    """DistributedDataParallel's own options, handed to it by Accelerate; they change no result but for rounding."""

    gradient_as_bucket_view: bool = False  # gradients live in the buffers that are exchanged: their memory once less
    static_graph: bool = False
    bucket_cap_mb: Positive = 25
    find_unused_parameters: bool = False


class TrainConfig(Section):
    method: str = "dinorankclip"
    order: Annotated[int, Field(ge=0)] = 3
    transition_depth: Positive = 32
    batch_size: Annotated[int, Field(ge=2)] = 1024
    micro_batch_size: Positive | None = None  # pairs that a process encodes at once; null: its whole share
    compile: bool = False  # torch.compile of trunk, student and fusion
    grad_checkpointing: bool = False  # blocks keep their inputs alone and run again in the backward pass
    epochs: Positive = 30
    max_steps: Positive | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8  # AdamW's ε
    grad_clip: Weight = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of an average of the weights, which the run leaves
    warmup_steps: Annotated[int, Field(ge=0)] = 1500
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    ddp: DdpConfig = DdpConfig()
    channels_last: bool = False  # a convolutional trunk's memory layout: faster, and sums are rounded otherwise
    seed: int = 0
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    validate_every: Positive | None = 500
    zero_shot: Source | None = None  # an entry of evaluate.suite, measured with every validation; selects nothing
    log_every: Positive = 10
    term_gradients_every: Positive | None = (
        500  # steps between measurements of every term's gradient; one backward each
    )
    explosion: ExplosionConfig | None = ExplosionConfig()  # null: only a loss that is not finite ends a run
    wandb: str | None = None  # a project of Weights & Biases to send the figures to

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads an unquoted no as false


class LossConfig(Section):
    contrastive: Literal["clip", "alip"] = "clip"
    cyclic_in_modal: Weight = 0.0
    cyclic_cross: Weight = 0.0
    simclr: Weight = 0.0
    simclr_temperature: Annotated[float, Field(gt=0)] = 0.1
    simclr_hidden: Positive = 4096
    simclr_dim: Positive = 256
    cross: Weight = 1.0
    in_modal: Weight = 1.0
    ramp: Share = 0.667
    ramp_shape: Literal["cosine", "linear"] = "cosine"
    positions: Literal["head_tail", "uniform"] = "head_tail"
    head_share: Share = 0.5
    list_depth: Positive | None = None
    transition_dim: Positive = 64
    head: Literal["auto", "chunked", "triton"] = "auto"  # which code scores positions with transitions
    include_self: bool = False
    gram: Weight = 1.0
    rkd: Weight = 1.0
    global_: Weight = Field(default=1.0, alias="global")
    kd: Weight = 0.0  # cosine of every token to the teacher's
    crd: Weight = 0.0  # contrast of student's and teacher's vectors
    crd_temperature: Annotated[float, Field(gt=0)] = 0.07
    crd_dim: Positive = 128
    text_target: Literal["global", "projected"] = "global"  # what the text branch predicts
    text_projection: Path | None = None  # safetensors: weight (P, C), perhaps bias (P,)
    gate_l1: Weight = 0.01
    conflict: Weight = 1.0

    @model_validator(mode="after")
    def _projection_where_projected(self) -> LossConfig:
        if self.text_target == "projected" and self.text_projection is None:
            raise ValueError("text_target projected needs a file: set text_projection")
        if self.text_target == "global" and self.text_projection is not None:
            raise ValueError("text_projection is used by text_target projected alone: set that, or remove the file")
        return self


class EvaluateConfig(Section):
    suite: str = "full"
    datasets: Path | None = None
    batch_size: Positive = 256


class CaptionConfig(Section):
    """`pipe caption`: who writes a synthetic caption of each row, and how."""

    model: Source | None = None  # a folder (./FOLDER), or a repository of the hub
    prompt: str | None = None  # null: none, or a plain one for models with a chat template
    max_new_tokens: Positive = 40
    num_beams: Positive = 1
    batch_size: Positive = 32
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    split: Literal["all", "train"] = "all"


class Config(Section):
    """The resolved configuration. Paths are absolute; method and fusion files have been applied."""

    workspace: Path = Path("./workspace")
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    caption: CaptionConfig = CaptionConfig()

    @model_validator(mode="after")
    def _one_way_to_crop(self) -> Config:
        if self.data.roi is not None and self.teacher.views:
            raise ValueError("data.roi and teacher.views exclude each other: crops of one view, or several stored ones")
        return self

    @model_validator(mode="after")
    def _online_sees_its_own_images(self) -> Config:
        if self.teacher.online and self.data.permute_targets:
            raise ValueError(
                "teacher.online and data.permute_targets (fusion shuffled-cache) exclude each other: a teacher in the "
                "loop looks at a batch's own images"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """Plain JSON-able values under the YAML's own names."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
