"""Arguments, exit statuses and error lines of the commands, as a user meets them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import Parser
from launch.config import load_recipe
from launch.rundir import first_difference, open_run
from launch.runner import choose_runner
from stages.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["recipe", "pretrain", "midtrain", "sft", "qat", "evaluate", "export", "generate", "list", "measure", "agent",
            "prune", "scaling_law"]


def command(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, tmp_path: Path) -> None:
    done = command(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "usage" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("pretrain", ["--recipe", "smoke", "--train.stepz", "20"], "train.steps"),
        ("pretrain", ["--recipe", "nothing"], "list.py"),
        ("pretrain", ["--recipe", "smoke", "stray"], "stray"),
        ("pretrain", ["--recipe", "smoke", "--train.steps"], "no value"),
        ("pretrain", [], "--recipe"),
        ("sft", ["--recipe", "smoke"], "--init-from"),
        ("recipe", ["--recipe", "smoke", "--stages", "pretrain,polish"], "polish"),
        ("export", ["--to", "gguf", "--output", "x", "--checkpoint", "y"], "no such folder"),
        ("export", ["--to", "hf", "--output", "x", "--checkpoint", "y", "--random-weights"], "--random-weights"),
        ("export", ["--to", "hf", "--output", "x", "--checkpoint", "y", "--train.steps", "5"], "--train.steps"),
        ("export", ["--to", "hf", "--output", "/proc/x/y", "--checkpoint", "y"], "/proc/x/y"),
        ("evaluate", ["--model", "none", "--tasks", "arc_eazy", "--output", "o.json"], "arc_eazy"),
        ("evaluate", ["--model", "none", "--tasks", ",", "--output", "o.json"], "--tasks"),
        ("evaluate", ["--model", "none", "--tasks", "a", "--limit", "0", "--output", "o.json"], "--limit"),
        ("evaluate", ["--model", "none", "--tasks", "a,x/a.jsonl", "--output", "o.json"], "'a'"),
        ("evaluate", ["--model", "none", "--tasks", "a", "--output", "."], "exists"),
        ("evaluate", ["--model", "none", "--tasks", "a", "--output", "/proc/x/s.json"], "cannot be written"),
        ("recipe", ["--recipe", "smoke", "--evaluation.tasks", '["a", "x/a.txt"]'], "evaluation.tasks"),
        ("generate", ["--model", "none", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        ("generate", ["--model", "none", "--prompt", "a", "--seed", str(2**70)], "--seed"),
        ("generate", ["--model", "none", "--prompt", os.fsdecode(b"\xff\xfe")], "--prompt"),
    ],
)
def test_bad_input_is_one_line_and_status_2(name: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    done = command(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_overrides_take_both_spellings_and_both_forms() -> None:
    parser = Parser("x")
    _, overrides = parser.parse(["--recipe", "smoke", "--train.steps", "20", "--train.log-every=1"])
    assert overrides == {"train.steps": "20", "train.log-every": "1"}


def test_a_used_run_directory_is_refused_and_resumed_only_with_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", {})
    with open_run(recipe, tmp_path / "run", resume=False):
        pass
    with pytest.raises(InputError, match="--resume"), open_run(recipe, tmp_path / "run", resume=False):
        pass
    with open_run(recipe, tmp_path / "run", resume=True):
        pass
    other = load_recipe("smoke", {"pretrain.optim.lr": "0.5"})
    with pytest.raises(InputError, match=r"pretrain\.optim\.lr"), open_run(other, tmp_path / "run", resume=True):
        pass


def test_a_run_directory_held_by_another_process_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", {})
    with open_run(recipe, tmp_path / "run", resume=False):
        code = (
            "import sys; from pathlib import Path; from launch.config import load_recipe; from launch.rundir import open_run\n"
            f"with open_run(load_recipe('smoke', {{}}), Path({str(tmp_path / 'run')!r}), resume=True): pass"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is in use by another process" in done.stderr


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"), open_run(load_recipe("smoke", {}), tmp_path, resume=False):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_more_workers_or_another_log_interval_is_the_same_run() -> None:
    before = load_recipe("smoke", {})
    assert first_difference(before, load_recipe("smoke", {"launch.workers": "2", "train.log_every": "9"})) is None
    assert "train.seed" in str(first_difference(before, load_recipe("smoke", {"train.seed": "9"})))


def test_the_runner_follows_the_recipe_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    one, two = load_recipe("smoke", {}).launch, load_recipe("smoke", {"launch.workers": "2"}).launch
    assert (choose_runner(one), choose_runner(two)) == ("local", "ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert choose_runner(one) == "ray"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_runner(two) == "local"
    with pytest.raises(InputError, match="torchrun started 2"):
        choose_runner(one)


REFUSED = [
    ["--pretrain.data.sources", '[{name="mine", path="lost.jsonl"}]'],
    ["--pretrain.seq_len", "1000000"],
    ["--model.vocab_size", "10"],
    ["--tokenizer.vocab_size", "10"],
    ["--pretrain.data.sources.0.max_passes", "1e-9"],
]


@pytest.mark.parametrize("wrong", REFUSED, ids=lambda wrong: wrong[0])
def test_input_that_is_refused_leaves_the_directory_to_the_corrected_command(wrong: list[str], tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    arguments = ["--recipe", "smoke", "--output-dir", str(run), "--train.held_out", "[]", "--train.steps", "1",
                 "--tracking.wandb", "disabled"]
    done = command("pretrain", *arguments, *wrong, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    left = {path.name for path in run.iterdir()} if run.exists() else set()
    assert left <= {"data"}
    with open_run(load_recipe("smoke", {}), run, resume=False):
        pass


def test_what_is_not_the_inputs_fault_or_came_after_training_keeps_the_run(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", {})
    with pytest.raises(RuntimeError), open_run(recipe, tmp_path / "a", resume=False):
        raise RuntimeError("a crash")
    assert (tmp_path / "a" / "recipe.toml").is_file()
    with pytest.raises(InputError, match="late"), open_run(recipe, tmp_path / "b", resume=False):
        (tmp_path / "b" / "pretrain").mkdir()
        (tmp_path / "b" / "pretrain" / "metrics.jsonl").write_text('{"step": 1}\n')
        raise InputError("late")
    assert (tmp_path / "b" / "recipe.toml").is_file() and (tmp_path / "b" / "pretrain" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_standard_output_is_one_line_and_status_1(name: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"], cwd=tmp_path, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "standard output cannot be written" in done.stderr


@pytest.mark.parametrize("arguments", ["list.py", "list.py --json", "list.py --help", "generate.py --help"])
@pytest.mark.parametrize("where", [">/dev/full", ">&-", ">&- 2>&-"])
def test_a_closed_or_full_standard_output_is_no_traceback(arguments: str, where: str, tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} {ROOT}/launch/{arguments} {where}"], cwd=tmp_path,
                          stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == (0 if "2>&-" in where else 1), done.stderr


def test_bad_input_has_its_status_where_standard_error_is_closed(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} {ROOT}/launch/pretrain.py --recipe nothing 2>&-"], cwd=tmp_path)
    assert done.returncode == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, number):
    from launch import rundir

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"out.json was not written \(.*free some space"):
        rundir.write_json(tmp_path / "new" / "out.json", {})
    assert not list(tmp_path.iterdir())


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """What the libraries beneath say of it: Python's OSError, Rust's text."""
    from launch import rundir

    for problem in (OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(RunError, match="model was not written"), rundir.writing(tmp_path / "new" / "model"):
            (tmp_path / "new").mkdir()
            raise problem
        assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), rundir.writing(tmp_path / "model"):
        _ = 1 / 0


def test_a_name_without_room_for_its_beginning_is_refused(tmp_path):
    from launch.rundir import check_output

    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / ("n" * 250))
