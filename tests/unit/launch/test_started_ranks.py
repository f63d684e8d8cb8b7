"""What srun, mpiexec and our own launcher tell a rank, as torch.distributed reads it; without any of them."""

import os
import sys
from types import SimpleNamespace

import pytest

from fourfold.launch.processes import start_ranks
from fourfold.launch.training.mpi import adopt_mpi_ranks, started_by_mpi
from fourfold.launch.training.slurm import adopt_slurm_ranks, first_host, started_by_slurm, tasks_per_node

TASK = {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_JOB_ID": "70000", "SLURM_STEP_ID": "3",
        "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[08-09,12]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}  # fmt: skip
READ = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def adopted(monkeypatch):
    """What torch.distributed reads after srun's variables were adopted."""

    def adopt(changes):
        monkeypatch.setattr(os, "environ", {})
        adopt_slurm_ranks(TASK | changes)
        return [os.environ[name] for name in READ]

    return adopt


@pytest.mark.parametrize(("device_type", "threads"), [("cpu", "1"), ("cuda", None)])
def test_ranks_of_one_machine_do_not_look_up_its_name(monkeypatch, device_type, threads):
    """Those on GPUs have gloo, too."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: lambda *words: None)
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    start_ranks("fourfold.launch.train", [], num_ranks=2, device_type=device_type)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_the_last_of_three_uneven_nodes(adopted):
    assert adopted({}) == ["4", "5", "0", "1", "n08", str(15_000 + 70_003 % 45_000)]


def test_another_node_of_the_three(adopted):
    changes = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    assert adopted(changes)[:4] == ["3", "5", "1", "2"]


def test_a_port_that_is_given_counts(adopted):
    assert adopted({"MASTER_PORT": "4321"})[-1] == "4321"


@pytest.mark.parametrize("told", ["", "2(x", "2,2"], ids=["nothing", "no list", "other nodes"])
def test_without_the_tasks_of_each_node_they_are_taken_for_even(adopted, told):
    assert adopted({"SLURM_STEP_TASKS_PER_NODE": told})[3] == "2"


def test_several_hosts_without_their_names_are_refused(adopted):
    with pytest.raises(ValueError, match="without SLURM_STEP_NODELIST: use torchrun"):
        adopted({"SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize(
    ("changes", "by_slurm"),
    [
        ({}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # one task is a world of one, or a launcher's
        ({"RANK": "0"}, False),  # a torchrun in the task started it
    ],
)
def test_who_started_a_rank(changes, by_slurm):
    assert started_by_slurm(TASK | changes) == by_slurm


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("node[07-09,12],other", "node07"), ("a,b", "a"), ("rack[1-2]n[3,5],x", "rack1n3"), ("h-1.c[2]", "h-1.c2")],
)
def test_the_first_host(nodelist, first):
    assert first_host(nodelist) == first


def test_tasks_by_node():
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def test_a_launcher_of_another_mpi_is_refused(monkeypatch):
    """mpiexec of one MPI and mpi4py of another make each process a world of its own, which trains alone."""
    environment = {"OMPI_COMM_WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", environment)
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1, rank=0))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=alone))
    assert started_by_mpi(environment)
    with pytest.raises(ValueError, match=r"started 2 processes, and mpi4py sees 1: .*srun --mpi=none, or torchrun"):
        adopt_mpi_ranks()
