"""The wheel: what is in it, and that it works from anywhere without the checkout."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from sparsek_tune.doctor import NEEDED
from sparsek_tune.kernel_templates import TEMPLATES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "checkout"
    # A copy: building must not leave anything in the checkout.
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for path in [p for name in names if name and (p := ROOT / name).is_file()]:
        to = source / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command = [*pip, "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return site


def python(site: Path, code: str) -> str:
    """Output of code run from / with only ``site`` in front: -I would hide it, so the editable install is removed."""
    prelude = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')"
        f" and '__editable__' not in repr(f)]; sys.path.insert(0, {str(site)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"sparsek_tune"}
    assert {"sparsek_tune/py.typed", "sparsek_tune/event.schema.json"} <= set(names)
    for package in ("kernel_templates", "db", "db/migrations", "db/pretuned", "tune", "bench", "simulate"):
        have = {p.name for p in (ROOT / _folder(package)).iterdir() if p.suffix in (".py", ".sql", ".json")}
        assert have <= {n.split("/")[-1] for n in names if n.startswith(f"sparsek_tune/{package}/")}, package
    assert not any(n.endswith((".db", ".whl")) for n in names)


def _folder(package: str) -> str:
    return f"sparsek_tune/{package}" if package in ("tune", "bench", "report", "simulate") else package


def test_imports_from_elsewhere(installed):
    where = python(installed, "import sparsek_tune.ops, sparsek_tune.db.store as s; print(s.__file__)")
    assert where.startswith(str(installed))


def test_source_hashes_are_those_of_the_checkout(installed):
    code = "from sparsek_tune.kernel_templates import TEMPLATES as T; print(*(t.source_hash for t in T.values()))"
    assert python(installed, code).split() == [t.source_hash for t in TEMPLATES.values()]


def test_command_line_and_database_work(installed, tmp_path):
    code = (
        f"import os; os.environ['SPARSEK_TUNE_CACHE'] = {str(tmp_path / 'c.db')!r}\n"
        "from sparsek_tune.db.store import Store\n"
        "with Store() as s: print(len(s.winners()))\n"
        "import sys; sys.argv = ['sparsek-tune', 'resolve', '--target', 'cuda:90', '--json']\n"
        "from sparsek_tune.cli import main; main()"
    )
    out = python(installed, code)
    assert out.startswith("0\n{") and '"grade": ' in out


def test_metadata(wheel):
    """Users get lower bounds, so that no torch is replaced; the pins stay in the constraints."""
    files = zipfile.ZipFile(wheel)
    info = next(n for n in files.namelist() if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
    metadata = message_from_bytes(files.read(f"{info}/METADATA"))
    needs = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {re.split(r"[<>=; ]", r)[0] for r in needs} == set(NEEDED)
    assert not any("==" in r.split(";")[0] for r in needs)
    assert "Apache License" in files.read(f"{info}/licenses/LICENSE").decode()
    assert "sparsek-tune = sparsek_tune.cli:main" in files.read(f"{info}/entry_points.txt").decode()


def test_bounds_agree():
    """The doctor's bounds are the project's, and the constraints fulfil them and pin all that is named."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + project["optional-dependencies"]["dev"]
    lows = {m[1]: _numbers(m[2]) for r in named if (m := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", r))}
    assert {name: lows[name][: len(low)] for name, low in NEEDED.items()} == NEEDED
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert all(_numbers(pins[name]) >= low for name, low in lows.items())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_readme_example_runs():
    """The example, compiled without a code generator to keep it short, learns something in its scorer."""
    import torch

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict = {}
    exec(code[1].rsplit("\n\n", 1)[0], scope)
    model = scope["Attention"](dim=64, heads=4, kv_heads=2, k=8, window=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)))
    out.square().sum().backward()
    assert out.shape == (2, 40, 64) and model.scorer.weight.grad.abs().sum() > 0
