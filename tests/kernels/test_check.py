"""Kernel variants against the reference in one program that needs no Python, on this machine and as Arm CPUs."""

from __future__ import annotations

import subprocess

import pytest

from kernels.runtime import isas
from tests.helpers.emulated import NATIVE, run
from tests.helpers.packed_models import CONFIGS, MIXTURES, packed

CPUS = {  # what `-cpu` of qemu-aarch64 has: a phone of 2021 and later, one of 2018 and later, one before
    "max": ["ref", "neon_dotprod", "neon_i8mm"],
    "cortex-a76": ["ref", "neon_dotprod"],
    "cortex-a57": ["ref"],
}


def test_every_variant_of_this_machine_gives_the_bits_of_the_reference():
    result = run("pocketforge-check")
    assert result["isa"] == [name for name, runs in isas().items() if runs]
    assert result["failures"] == [] and result["failed"] == 0
    assert result["checks"] >= 5000 * (len(result["isa"]) - 1)


@pytest.mark.parametrize("cpu", CPUS)
def test_every_variant_of_an_arm_cpu_gives_the_bits_of_the_reference(cpu):
    """A CPU without the instructions runs the reference alone, and stops at none that it lacks."""
    result = run("pocketforge-check", "--quick", cpu=cpu)
    assert result["isa"] == CPUS[cpu]
    assert result["failures"] == [] and result["failed"] == 0
    assert result["checks"] >= 4000 * (len(result["isa"]) - 1)


@pytest.mark.parametrize("cpu", CPUS)
def test_a_model_on_an_arm_cpu_gives_the_ids_and_the_bits_of_this_machine(cpu, tmp_path):
    for name, options in (("plain", {}), ("untied_norms", {"embedding": "int8"}), ("dense_first", {})):
        config = (CONFIGS | MIXTURES)[name]
        folder = tmp_path / name
        folder.mkdir()
        _, path = packed(config, folder, **options)
        for kv in ("f16", "int8"):
            arguments = [str(path), "--ids", ",".join(str(13 * i % 199) for i in range(39)), "--decode-tokens", "6", "--kv", kv]
            here = run("pocketforge-run", *arguments)
            assert len(here["ids"]) == 6
            for isa in CPUS[cpu]:
                there = run("pocketforge-run", *arguments, cpu=cpu, isa=isa)
                assert there["isa"] == isa
                assert (there["ids"], there["logits_crc32c"]) == (here["ids"], here["logits_crc32c"]), (name, kv, isa)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_fastest_variant_is_taken_unasked(cpu, tmp_path):
    _, path = packed(CONFIGS["one_kv_head"], tmp_path)
    assert run("pocketforge-run", str(path), "--ids", "1,2,3", "--decode-tokens", "2", cpu=cpu)["isa"] == CPUS[cpu][-1]


def test_the_program_says_how_it_is_called():
    for arguments in (["--fast"], ["--one", "ref", "int4", "16", "32", "1"], ["--one", "avx2", "int4", "16", "31", "1"]):
        done = subprocess.run([str(NATIVE / "pocketforge-check"), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "usage: pocketforge-check" in done.stderr and not done.stdout
