"""How many instructions the Arm kernels take: the products are counted exactly, and stores show a tile that spills."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers.emulated import AARCH64, ROOT, emulator

N, K = 64, 1024
# Stores of one call that computes 8 rows of 4 tokens, or a token's 32 rows: results and the caller's registers. gcc 12's
# counts are a few below. A register spilled in the loop over K adds 32 or more.
TILE_STORES, VECTOR_STORES = 20, 20


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("plugin") / "count_instructions.so"
    source = ROOT / "kernels" / "cpu" / "tests" / "count_instructions.c"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(path), str(source)], check=True)
    return path


def counts(plugin, isa, encoding, tokens):
    """{function: {kind: count}} of one product [tokens, K] x [N, K]."""
    command = [emulator(), "-cpu", "max", "-plugin", str(plugin), "-d", "plugin", str(AARCH64 / "pocketforge-check"),
               "--one", isa, encoding, str(N), str(K), str(tokens)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode == 1 and "plugin" in done.stderr:
        pytest.skip(f"this qemu-aarch64 runs no plugins: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0 and '"failed":0' in done.stdout, done.stderr[-2000:]
    rows = [line.split() for line in done.stderr.splitlines() if len(line.split()) == 6]
    kinds = ("instructions", "sdot", "smmla", "loads", "stores")
    return {symbol: dict(zip(kinds, map(int, numbers), strict=True)) for symbol, *numbers in rows}


def total(functions, name, kind):
    return sum(function[kind] for symbol, function in functions.items() if name in symbol)


@pytest.mark.parametrize("encoding", ["int4", "int8"])
@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
def test_one_token_takes_a_dot_product_for_sixteen_products(plugin, isa, encoding):
    functions = counts(plugin, isa, encoding, 1)
    assert total(functions, "", "sdot") == total(functions, f"{encoding}_vector", "sdot") == N * K // 16
    assert total(functions, "", "smmla") == 0
    assert total(functions, f"{encoding}_vector", "stores") <= VECTOR_STORES * N / 32


@pytest.mark.parametrize("encoding", ["int4", "int8"])
@pytest.mark.parametrize("isa, name, kind, products", [("neon_dotprod", "dot", "sdot", 16), ("neon_i8mm", "tile", "smmla", 32)])
def test_several_tokens_take_no_product_too_many_and_spill_nothing(plugin, isa, name, kind, products, encoding):
    tokens = 8
    functions = counts(plugin, isa, encoding, tokens)
    tile = f"{encoding}_{name}"
    everywhere = total(functions, "", "sdot") + total(functions, "", "smmla")
    assert total(functions, tile, kind) == everywhere == tokens * N * K // products
    assert total(functions, tile, "stores") <= TILE_STORES * (tokens // 4) * (N // 8)


def test_counts_are_the_same_in_every_run(plugin):
    first, second = (counts(plugin, "neon_i8mm", "int4", 8) for _ in range(2))
    assert {k: v for k, v in first.items() if "int4_tile" in k} == {k: v for k, v in second.items() if "int4_tile" in k} != {}
