"""`minisgl profile nsys`: a command under Nsight Systems, with the engine's NVTX ranges."""

from __future__ import annotations

import argparse

from minisgl.cli.lab import page, tool
from minisgl.types import MinisglError

HELP = "run a command under Nsight Systems: a timeline of its processes, kernels and NVTX ranges"
INSTALL = (
    "install Nsight Systems (package nsight-systems-cli of NVIDIA's CUDA repository, or "
    "https://developer.nvidia.com/nsight-systems) and put it on the PATH"
)
DEFAULT = ("bench", "offline", "--num-prompts", "8", "--input-len", "128", "--output-len", "16")


def add_options(parser: argparse.ArgumentParser) -> None:
    page.add_common(parser)
    tool.add_program(parser, DEFAULT)


def run(args: argparse.Namespace) -> None:
    """Writes nsys.nsys-rep, to be opened in Nsight Systems. The engine is a child process, and is followed.

    Raises:
        MinisglError: Nsight Systems isn't installed, or the command failed.
    """
    nsys = tool.find("nsys", INSTALL)
    program = tool.program(args.program)
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "nsys.nsys-rep"
    command = [
        nsys, "profile", "--trace=cuda,nvtx,osrt", "--sample=none", "--cuda-graph-trace=node",
        f"--output={report}", "--force-overwrite=true", *program,
    ]  # fmt: skip
    code = tool.run(command, {"MINISGL_NVTX": "1"})
    if code != 0 or not report.is_file():
        raise MinisglError(f"nsys ended with exit code {code}; what it and the command said is above")
    print(f"written to {report}; open it in Nsight Systems, or: nsys stats {report}")
