"""`pipe`: the Typer app. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pipeline.config import Config

RESUMABLE = 75  # EX_TEMPFAIL: the same command goes on where this one stopped

app = typer.Typer(
    name="pipe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Train CLIP with a cached DINOv3 teacher and a high-order ranking loss (DINORANKCLIP, arXiv 2605.06592).",
    epilog="In order: pipe init, index, extract-teacher, train, evaluate. No data at hand: pipe demo.",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The YAML; else $PIPE_CONFIG, else ./pipe.yaml."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set train.lr=3e-4; repeatable."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Command = TypeVar("Command", bound=Callable[..., None])


def friendly(command: Command) -> Command:
    """Turn every way in which a command can end into one line and the right exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from pipeline.console import setup_logging
        from pipeline.errors import PipeError, Stopped

        setup_logging(logging.DEBUG if debug else logging.INFO)
        _stop_on_sigterm()
        try:
            command(*args, debug=debug, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            if debug and not isinstance(error, SystemExit):
                raise
            if isinstance(error, PipeError):
                _fail(str(error))
            if isinstance(error, Stopped):
                typer.echo(f"stopped: {error}", err=True)
                raise typer.Exit(RESUMABLE) from None
            if isinstance(error, KeyboardInterrupt):
                typer.echo("stopped: run the same command again", err=True)
                raise typer.Exit(RESUMABLE) from None
            if isinstance(error, BrokenPipeError):  # `pipe evaluate | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            if isinstance(error, OSError):
                _fail(f"{error.strerror or error}" + (f", {error.filename}" if error.filename else ""))
            if isinstance(error, Exception):
                _fail(f"unexpected {type(error).__name__}: {error}; please report it with the output of --debug")
            raise

    return wrapped  # type: ignore[return-value]


def _stop_on_sigterm() -> None:
    """Until a command has handlers of its own, SIGTERM ends it as Ctrl-C does: cleanly, with exit code 75."""
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _fail(line: str) -> None:
    typer.echo(f"error: {' '.join(line.split())}", err=True)
    raise typer.Exit(1)


def load(config: Path | None, sets: list[str] | None, flags: dict[str, Any] | None = None) -> Config:
    """The resolved configuration of --config, else $PIPE_CONFIG, else ./pipe.yaml."""
    from pipeline.config import load_config
    from pipeline.errors import PipeError

    path = config or Path(os.environ.get("PIPE_CONFIG") or "pipe.yaml")
    if not path.exists():
        raise PipeError("there is no such config file", where=path, fix="write one: pipe init --data SOURCE")
    return load_config(path.absolute(), flags=flags, sets=sets or [])


@app.command()
@friendly
def init(
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help="Folder, glob or brace range of tars; CSV; TSV.")
    ],
    preset: Annotated[str, typer.Option("--preset", metavar="NAME", help="A file of configs/: cc3m, small.")] = "cc3m",
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.")] = Path("pipe.yaml"),
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a config file for a data source."""
    from stages import init as stage

    stage.run(data, preset=preset, sets=sets or [], out=out)


@app.command()
@friendly
def index(config: ConfigOption = None, sets: SetOption = None, debug: DebugOption = False) -> None:
    """List every image and caption of the data source in a manifest."""
    settings = load(config, sets)
    from stages import index as stage

    stage.run(settings)


@app.command("extract-teacher")
@friendly
def extract_teacher(
    config: ConfigOption = None,
    sets: SetOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="ROWS", help="Only the first rows.")] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only the I-th of N parts; default: as torchrun or Slurm say."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, metavar="N", help="On this machine; default: one a GPU.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Stage one: run the frozen teacher once over every image and store its features."""
    settings = load(config, sets)
    from pipeline.cache.part import Part
    from stages import extract_teacher as stage

    stage.run(settings, limit=limit, part=None if part is None else Part.parse(part), processes=processes)


@app.command("caption")
@friendly
def caption_command(
    config: ConfigOption = None,
    sets: SetOption = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME_OR_FOLDER", help="The captioner; default: caption.model.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw captions of another captioner or manifest away.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="ROWS", help="Only the first rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in the file as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Have a captioning model write a synthetic caption of every image."""
    settings = load(config, sets, {"caption.model": model})
    from stages import caption as stage

    stage.run(settings, overwrite=overwrite, limit=limit, as_json=as_json)


cache_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a teacher cache, check it, copy it.")
app.add_typer(cache_app, name="cache")

CacheArgument = Annotated[
    str | None, typer.Argument(metavar="[PATH]", help="The cache's folder or URL; default: the workspace's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def _config_or_path(path: str | None, config: Path | None, sets: list[str] | None) -> Config | None:
    """None where a cache is named and no config is: then none is needed."""
    return None if path is not None and config is None and not sets else load(config, sets)


@cache_app.command("info")
@friendly
def cache_info(
    path: CacheArgument = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """What it is, how big, how faithful, how complete."""
    settings = _config_or_path(path, config, sets)
    from stages import cache as stage

    stage.info(stage.locate(path, settings), settings, as_json=as_json)


@cache_app.command("verify")
@friendly
def cache_verify(
    path: CacheArgument = None,
    repair: Annotated[bool, typer.Option("--repair", help="Extract the damaged shards again.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Read all of it; name every damaged shard and row. Exit code 1 on any damage."""
    settings = load(config, sets) if repair else _config_or_path(path, config, sets)
    from stages import cache as stage

    if not stage.verify(stage.locate(path, settings), settings, repair=repair, as_json=as_json):
        raise typer.Exit(1)


@cache_app.command("stats")
@friendly
def cache_stats(
    path: CacheArgument = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, metavar="N", help="A random choice of N rows.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of that choice.")] = 0,
    view: Annotated[str | None, typer.Option("--view", metavar="NAME", help="Of this further view.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Moments and spectra of its features."""
    settings = _config_or_path(path, config, sets)
    from stages import cache as stage

    stage.stats(stage.locate(path, settings), rows=rows, seed=seed, view=view, as_json=as_json)


@cache_app.command("copy")
@friendly
def cache_copy(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new cache's folder.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="PATH", help="The cache to copy, or its URL; default: the workspace's."),
    ] = None,
    rows: Annotated[str | None, typer.Option("--rows", metavar="A-B", help="Rows A to B, both included.")] = None,
    rows_file: Annotated[Path | None, typer.Option("--rows-file", metavar="FILE", help="A row number a line.")] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="train|val", help="Rows of this split.")] = None,
    scales: Annotated[str | None, typer.Option("--scales", metavar="NAMES", help="By commas, e.g. fine,mid.")] = None,
    views: Annotated[
        str | None, typer.Option("--views", metavar="NAMES", help="Further views, by commas, or none; default: all.")
    ] = None,
    compress: Annotated[
        str | None, typer.Option("--compress", metavar="blosc|zstd", help="Compress it; then no row can be added.")
    ] = None,
    level: Annotated[int | None, typer.Option("--level", metavar="N", help="blosc 0-9, zstd 1-22; default 5.")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Copy some rows, scales or views into a new cache; rows keep their numbers, others are absent."""
    settings = _config_or_path(source, config, sets)
    from stages.cache import locate
    from stages.cache_copy import copy

    chosen = {"rows": rows, "split": split, "scales": scales, "views": views, "compress": compress}
    copy(locate(source, settings), out, settings, rows_file=rows_file, level=level, **chosen)


@app.command()
@friendly
def train(
    config: ConfigOption = None,
    sets: SetOption = None,
    order: Annotated[
        int | None, typer.Option("--order", min=0, help="0: CLIP, 1: RankCLIP, 2 and more: transitions.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="clip, cyclip, alip, slip, rankclip or dinorankclip.")
    ] = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            "--fusion",
            help="full, none, no-pyramid, no-attention, no-refiner, image-only, no-gate, no-distill, shuffled-cache.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="RUN", help="The run's folder name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    debug: DebugOption = False,
) -> None:
    """Stage two: train a model on images, captions and the cached teacher features."""
    flags = {"train.order": order, "train.method": method, "model.fusion": fusion}
    settings = load(config, sets, flags)
    from stages import train as stage

    stage.run(settings, name=name, resume=resume)


@app.command()
@friendly
def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs by name, or folders by path; default: all finished."),
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    suite: Annotated[str | None, typer.Option("--suite", metavar="NAME", help="A file of configs/suites.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure runs and write tables, figures and a report."""
    settings = load(config, sets, {"evaluate.suite": suite})
    from stages import evaluate as stage

    stage.run(settings, runs=runs or [], as_json=as_json)


def _config_unless_path(run: str, config: Path | None, sets: list[str] | None) -> Config | None:
    """None where a model is named by its path, or where no config is at hand: then none is needed."""
    from stages.which_model import is_path

    asked = config is not None or bool(sets)
    at_hand = Path(os.environ.get("PIPE_CONFIG") or "pipe.yaml").exists()
    return load(config, sets) if asked or (at_hand and not is_path(run)) else None


ModelArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A finished run's name, or the path of a run's or an export's folder.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")]


@app.command("export")
@friendly
def export_command(
    run: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Default: workspace/exports/RUN, or ./NAME-export.")
    ] = None,
    trunk: Annotated[
        bool, typer.Option("--trunk", help="The trunk alone, as a checkpoint that open_clip loads.")
    ] = False,
    hub: Annotated[
        str | None, typer.Option("--hub", metavar="ORG/NAME", help="Push it to the Hugging Face hub; needs a login.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="How weights are stored: float32, float16 or bfloat16.")
    ] = "float32",
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print where it is and its SHA-256 as JSON.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model that others can load: weights, config, model card."""
    settings = _config_unless_path(run, config, sets)
    from stages import export as stage

    stage.run(settings, run, out=out, trunk=trunk, dtype=dtype, overwrite=overwrite, hub=hub, as_json=as_json)


@app.command("embed")
@friendly
def embed_command(
    run: ModelArgument,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="Folder or glob of images; folder, glob or range of tars; CSV; TSV."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="NAME.parquet, NAME.npy, or a folder: a file for each tar."),
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", help="gated, trunk, student or fused; default: the model's output.")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Embed the source's captions, too.")] = False,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="Embed texts, one a line, in place of images.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images at a time.")] = 256,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
    config: ConfigOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model's embeddings of images or texts as Parquet or npy."""
    settings = _config_unless_path(run, config, sets)
    from stages import embed as stage

    options: dict[str, Any] = {"captions": captions, "texts": texts, "batch_size": batch_size, "overwrite": overwrite}
    stage.run(settings, run, source, out=out, node=node, as_json=as_json, **options)


@app.command()
@friendly
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A workspace of its own.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: does everything run?")] = False,
    debug: DebugOption = False,
) -> None:
    """All of it on generated scenes: from images to a report, on a laptop, in minutes."""
    from stages import demo as stage

    stage.run(out, quick=quick)


@app.command("model")
@friendly
def model_command(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A run by name, its folder, or an exported model; default: the config's."),
    ] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    order: Annotated[int | None, typer.Option("--order", min=0, help="As of pipe train.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="As of pipe train.")] = None,
    fusion: Annotated[str | None, typer.Option("--fusion", help="As of pipe train.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Parameters and FLOPs of each part, and whether the budgets are kept."""
    flags = {"train.order": order, "train.method": method, "model.fusion": fusion}
    needed = run is None or config is not None or not Path(run).exists()
    settings = load(config, sets, flags) if needed else None
    from stages import model as stage

    stage.run(settings, run, as_json=as_json)


teacher_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(teacher_app, name="teacher", help="The teacher itself.")


@teacher_app.command("check")
@friendly
def teacher_check(
    config: ConfigOption = None,
    sets: SetOption = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="COCO val2017's 000000039769, .jpg or .png.")
    ] = None,
    golden: Annotated[
        Path | None,
        typer.Option("--golden", metavar="FOLDER", help="Other values: expected_dinov3.json and the image it names."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Compare the teacher's features of one image with the published ones; exit code 1 unless they agree."""
    settings = load(config, sets)
    from stages import teacher as stage

    stage.check(settings, image=image, golden=golden, as_json=as_json)


if __name__ == "__main__":
    app()
