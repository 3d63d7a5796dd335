"""configs/accelerate/8gpu.yaml, read by accelerate's own launcher."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FILE = Path(__file__).parents[2] / "configs" / "accelerate" / "8gpu.yaml"
TRAIN = ["-m", "stages.cli", "train", "--config", "pipe.yaml"]


def test_accelerate_reads_it() -> None:
    found = load_config_from_file(str(FILE))
    assert found.distributed_type == DistributedType.MULTI_GPU
    assert (found.num_processes, found.num_machines, found.mixed_precision) == (8, 1, "no")
    assert found.dynamo_config == {}


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_launcher_takes_it_for_one_node_and_for_several(nodes: int) -> None:
    told = ["--num_machines", "4", "--num_processes", "32", "--machine_rank", "3", "--main_process_ip", "10.0.0.1"]
    asked = ["--config_file", str(FILE), *(told if nodes > 1 else []), *TRAIN]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(asked))
    assert (arguments.multi_gpu, arguments.num_processes, arguments.num_machines) == (True, 8 * nodes, nodes)
    assert (arguments.training_script, arguments.training_script_args) == ("stages.cli", TRAIN[2:])
    assert arguments.mixed_precision == "no"
