"""Environment variables of process launchers, read without heavy imports."""

from __future__ import annotations

import os

from atdiff.core.errors import UserError

__all__ = ["join_mpi", "num_processes", "refuse_other_training"]

# World size, rank, local rank and local size as set by Open MPI, MVAPICH, and MPICH or Intel MPI.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)

# Variables that make Accelerate train differently.
_OTHER_TRAINING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def num_processes() -> int:
    """Return the number of processes in this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_mpi() -> None:
    """Set the variables of ``torchrun`` in processes started by ``mpirun``, so that they form one group.

    Raises:
        UserError: they run on several machines without ``MASTER_ADDR``.
    """
    environment = os.environ
    # srun sets the last ones too, for tasks that may be unrelated.
    known = _MPI[:2] if "SLURM_STEP_ID" in environment else _MPI
    for size, rank, local_rank, local_size in known:
        if "WORLD_SIZE" in environment or int(environment.get(size, "1")) < 2:
            continue
        on_one_machine = environment.get(local_size) == environment[size]
        if not on_one_machine and "MASTER_ADDR" not in environment:
            raise UserError(
                f"mpirun started {environment[size]} processes on several machines: export MASTER_ADDR (the name "
                "of the first machine) and MASTER_PORT to all of them, or launch with torchrun."
            )
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "29500")
        environment["WORLD_SIZE"], environment["RANK"] = environment[size], environment[rank]
        environment["LOCAL_RANK"] = environment.get(local_rank, environment[rank])


def refuse_other_training() -> None:
    """Check that the launcher does not request weight splitting other than that of ``training.shard``.

    The request may come from an option of ``accelerate launch``, the file of ``accelerate config``, or the shell.

    Raises:
        UserError: it does.
    """
    for name, what in _OTHER_TRAINING.items():
        if os.environ.get(name, "false").lower() not in ("false", "no", "0", ""):
            raise UserError(
                f"the launcher requests {what} ({name}={os.environ[name]}), which is not supported: launch with "
                "--multi_gpu only, and set training.shard=true to split the weights over the processes."
            )
