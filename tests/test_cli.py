import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from database import make

from sparsek_tune import cli, options
from sparsek_tune.db.store import Measured, Store
from sparsek_tune.kernel_templates import TEMPLATES
from sparsek_tune.presets import shapes
from sparsek_tune.problem import target_device


def invoke(*args):
    return CliRunner().invoke(cli.main, list(args))


PROBLEM = shapes(("llama-3.1-8b",), ("n=4096,k=1024",))[0].problem
DEFAULT = TEMPLATES["forward"].default(PROBLEM, target_device("cuda:90"))


def test_help_is_quick():
    code = (
        "import sys; from click.testing import CliRunner; from sparsek_tune.cli import main\n"
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0 and 'resolve' in r.output\n"
        "print(*(m for m in ('torch', 'triton', 'optuna', 'sqlalchemy', 'rich') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_device_that_is_not_there(cache, monkeypatch):
    def none():
        raise RuntimeError("no CUDA device is available")

    monkeypatch.setattr(options, "current_device", none)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    result = invoke("run", "--device", "2", "--json")
    assert result.exit_code == 3 and "--device must be below 2" in result.stderr and "is 2" in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    result = invoke("resolve", "--device", "0")
    assert result.exit_code == 3 and "--device must be the index of a GPU, but is 0" in result.stderr
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # set by the command
    assert not cache.exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (("run", "--model", "gpt-9"), "gpt-9"),
        (("run", "--shape", "hq=7,hkv=2"), "hq must be a multiple of hkv"),
        (("run", "--shape", "m=7"), "fields hq"),
        (("run", "--shape", "n=-5"), "n must be at least 1, but is -5"),
        (("run", "--shape", "n=1e3"), "n must be a whole number, but is '1e3'"),
        (("run", "--shape", f"n=1{'0' * 19}"), "n must have at most 19 digits, but is '1"),
        (("run", "--budget", "abc"), "'abc' is not a valid number."),
        (("run", "--shape", "n=0"), "n must be at least 1, but is 0"),
        (("run", "--shape", "d=512"), "d must be at most 256"),
        (("run", "--shape", "dtype=fp8"), "bf16, fp16, fp32"),
        (("run", "--shape", "gate=q"), "kv, v, none"),
        (("run", "--shape", "n=4,n=5"), "twice"),
        (("run", "--target", "cuda:77"), "cuda:90"),
        (("run", "--target", "cuda:90", "--device", "0"), "exclude"),
        (("run", "--budget", "0"), "--budget"),
        (("run", "--budget", "nan"), "nan is not a finite number"),
        (("run", "--budget", "inf", "--json"), "inf is not a finite number"),
        (("worker", "--wait", "nan"), "nan is not a finite number"),
        (("run", "--gpus", "x"), "\"all\" or indices of GPUs such as 0,2, but is 'x'"),
        (("run", "--gpus", "0,"), "\"all\" or indices of GPUs such as 0,2, but is '0,'"),
        (("show", "--storage", ""), "but is empty"),
        (("run", "--effort", "huge"), "quick"),
        (("resolve", "--target", "rocm:90"), "cuda:90"),
    ],
)
def test_usage_errors(cache, args, words):
    result = invoke(*args)
    assert result.exit_code == 2 and words in result.stderr
    assert not cache.exists()


def test_resolve_needs_a_gpu_or_a_target(monkeypatch, cache):
    monkeypatch.setattr("sparsek_tune.options.gpu", lambda index: None)
    result = invoke("resolve")
    assert result.exit_code == 3 and "--target" in result.stderr


def test_a_storage_that_is_named_must_be_there_and_whole(cache, tmp_path):
    broken, there = tmp_path / "broken.db", tmp_path / "folder" / "cache.db"
    broken.write_bytes(b"no database" * 1000)
    for path, words in ((tmp_path / "none.db", "there is no database"), (broken, "is not a SQLite database")):
        result = invoke("resolve", "--target", "cuda:90", "--storage", str(path))
        assert result.exit_code == 4 and f"{path}" in result.stderr and words in result.stderr
        worker = invoke("worker", "--target", "cuda:90", "--storage", str(path))
        assert worker.exit_code == 4 and words in worker.stderr
    assert not (tmp_path / "none.db").exists()
    make(there)
    assert invoke("show", "--storage", str(there.parent), "--json").exit_code == 0
    assert invoke("resolve", "--target", "cuda:90", "--storage", str(there.parent)).exit_code == 0
    cache.write_bytes(broken.read_bytes())  # what programs would use, which go on without it
    damaged = make(tmp_path / "damaged.db")
    damaged.write_bytes(damaged.read_bytes()[:4096] + b"\xff" * 60000)
    result = invoke("resolve", "--target", "cuda:90", "--storage", str(damaged))
    assert result.exit_code == 4 and "is damaged" in result.stderr
    result = invoke("resolve", "--target", "cuda:90")
    assert result.exit_code == 0 and "is not a SQLite database" in result.stderr and "default" in result.stdout


def test_resolve_and_show_what_was_stored(cache):
    device, template = target_device("cuda:90"), TEMPLATES["forward"]
    config = next(c for c in template.feasible(PROBLEM, device) if c != DEFAULT)
    with Store(cache) as store:
        run = store.start_run("test")
        store.set_winner(store.record(device, template, PROBLEM, config, Measured("static", 1.0), run), None, 1.0)
        store.finish_run(run)
    result = invoke("resolve", "--target", "cuda:90", "--model", "llama-3.1-8b", "--shape", "n=4096,k=1024", "--json")
    kernels = json.loads(result.stdout)["plans"][0]["kernels"]
    assert kernels["forward"]["grade"] == "static" and kernels["forward"]["config"] == config
    assert kernels["dq"]["grade"] == "default"
    entry = json.loads(invoke("show", "--json").stdout)["entries"][0]
    assert entry["winner"]["config"] == config and entry["winner"]["static"] and entry["attempts"] == {"static": 1}
    plain = invoke("show").stdout
    assert "target cuda:90" in plain and "static:1" in plain
    plain = invoke("resolve", "--target", "cuda:90", "--model", "llama-3.1-8b", "--shape", "n=4096,k=1024").stdout
    assert "static" in plain


def test_resolve_explains_every_stored_config(cache):
    device = target_device("cuda:90")
    with Store() as store:
        for n, status in ((4096, "static"), (1 << 20, "static")):
            problem = PROBLEM._replace(n=n)
            m = store.record(device, TEMPLATES["forward"], problem, DEFAULT, Measured(status), store.start_run("t"))
            store.set_winner(m)
    args = ("resolve", "--target", "cuda:90", "--model", "llama-3.1-8b", "--shape", "n=4096,k=1024", "--explain")
    document = json.loads(invoke(*args, "--json").stdout)
    kernels = document["plans"][0]["kernels"]
    assert [(c["refused"], c["distance"]) for c in kernels["forward"]["candidates"]] == [
        ("", 0.0),
        ("too far away in n", 8.0),
    ]
    assert kernels["dq"]["candidates"] == []
    shown = " ".join(invoke(*args).stdout.split())
    assert "static: served" in shown and "too far away in n" in shown
    assert "candidates" not in json.loads(invoke(*args[:-1], "--json").stdout)["plans"][0]["kernels"]["forward"]


def test_database_errors_have_their_code(cache):
    assert invoke("show").exit_code == 4
    cache.write_bytes(b"this is no database, and it must survive" * 100)
    before = cache.read_bytes()
    for args in (("show",), ("run", "--target", "cuda:90")):
        result = invoke(*args)
        assert result.exit_code == 4 and str(cache) in result.stderr
    resolved = invoke("resolve", "--target", "cuda:90")
    assert resolved.exit_code == 0 and "default" in resolved.stdout
    assert cache.read_bytes() == before


def test_doctor(cache):
    result = invoke("doctor", "--json")
    findings = {f["subject"]: f for f in json.loads(result.stdout)["findings"]}
    assert {"python", "torch", "triton", "optuna", "sqlalchemy", "gpu", "database", "shipped"} <= set(findings)
    assert findings["database"]["level"] == "note" and "sparsek-tune run" in findings["database"]["mend"]
    assert result.exit_code == 0
    cache.write_bytes(b"junk" * 1000)
    broken = invoke("doctor")
    assert broken.exit_code == 1 and "SPARSEK_TUNE_CACHE" in broken.stdout


def test_doctor_looks_at_the_storage_that_commands_use(cache, tmp_path, monkeypatch):
    def database():
        return {f["subject"]: f for f in json.loads(invoke("doctor", "--json").stdout)["findings"]}["database"]

    make(tmp_path / "other.db")
    monkeypatch.setenv("SPARSEK_TUNE_STORAGE", str(tmp_path / "other.db"))
    assert database()["level"] == "ok" and f"{tmp_path / 'other.db'}: 1 tuned" in database()["found"]
    (tmp_path / "other.db").chmod(0o444)  # root could write it all the same, and does not
    assert database()["level"] == "note" and "read only" in database()["found"]
    monkeypatch.setenv("SPARSEK_TUNE_STORAGE", "postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert database()["level"] == "broken" and "secret" not in database()["found"]
    monkeypatch.setenv("SPARSEK_TUNE_STORAGE", "mysql://me:secret@host/none")
    result = invoke("doctor")
    assert result.exit_code == 2 and "SPARSEK_TUNE_STORAGE" in result.stderr and "secret" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["show"], ["show", "--json"], ["export", "-"], ["doctor"]])
def test_an_output_that_cannot_be_written_is_told(cache, arguments):
    make(cache)
    command = [sys.executable, "-m", "sparsek_tune.cli", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == "Error: the output cannot be written: No space left on device"


def test_doctor_names_a_missing_and_an_old_package(cache, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from sparsek_tune import doctor

    def version(name):
        if name == "optuna":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    findings = {f.subject: f for f in doctor.examine()}
    assert findings["optuna"].level == "broken" and "pip install 'optuna>=" in findings["optuna"].mend
    assert findings["torch"].level == "broken" and "2.11" in findings["torch"].mend


def findings_of(monkeypatch, tmp_path, *, driver, cuda):
    """What the doctor says of the GPU where torch, built for ``cuda`` (None: CPU), finds none."""
    import torch

    from sparsek_tune import doctor

    file = tmp_path / "driver"
    if driver:
        file.write_text(f"NVRM version: {driver}\nGCC version: 12\n")
    monkeypatch.setattr(doctor, "DRIVER", file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    return {f.subject: f for f in doctor.examine()}["gpu"]


def test_doctor_tells_no_gpu_from_one_that_cannot_be_used(cache, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert findings_of(monkeypatch, tmp_path, driver="", cuda=None).level == "note"
    cpu_build = findings_of(monkeypatch, tmp_path, driver="570.1", cuda=None)
    assert cpu_build.level == "broken" and "CUDA build of torch" in cpu_build.mend and "570.1" in cpu_build.found
    assert "upgrade the driver" in findings_of(monkeypatch, tmp_path, driver="570.1", cuda="13.0").mend
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert "CUDA_VISIBLE_DEVICES='9'" in findings_of(monkeypatch, tmp_path, driver="570.1", cuda="13.0").found


def test_doctor_survives_what_it_looks_at(cache, monkeypatch):
    from sparsek_tune import doctor

    def broken():
        raise OSError("gone")
        yield

    monkeypatch.setitem(doctor.LOOKS, "compilers", broken)
    findings = {f.subject: f for f in doctor.examine()}
    assert findings["compilers"].level == "broken" and "gone" in findings["compilers"].found
    assert findings["database"].level == "note"


def test_doctor_sees_stale_winners(cache, monkeypatch):
    device, template = target_device("cuda:90"), TEMPLATES["forward"]
    with Store(cache) as store:
        run = store.start_run("test")
        store.set_winner(store.record(device, template, PROBLEM, DEFAULT, Measured("static", 1.0), run))
    assert "stale" not in {f["subject"] for f in json.loads(invoke("doctor", "--json").stdout)["findings"]}
    monkeypatch.setitem(TEMPLATES, "forward", replace(template, sources=(__file__,)))
    stale = {f["subject"]: f for f in json.loads(invoke("doctor", "--json").stdout)["findings"]}["stale"]
    assert stale["level"] == "note" and stale["found"].startswith("1 ")


def test_entry_point_and_exit_code(tmp_path):
    env = {**os.environ, "SPARSEK_TUNE_CACHE": str(tmp_path / "none.db")}
    done = subprocess.run([sys.executable, "-m", "sparsek_tune.cli", "show"], env=env, capture_output=True, text=True)
    assert done.returncode == 4 and done.stdout == "" and "sparsek-tune run" in done.stderr
