"""Who may import whom, and what importing costs. DESIGN 3."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "propensity_dagster"
ORCHESTRATION = ("components", "defs", "definitions.py")
ONLY_IN = {"mlflow": "registry", "bentoml": "serving", "evidently": "monitoring", "shap": "explain"}
WORKER = PACKAGE / "serving"
WORKER_PACKAGES = {"bentoml", "msgspec", "numpy", "prometheus_client", "redis", "uvicorn", "yaml"}
HEAVY = ("torch", "shap", "mlflow", "evidently", "bentoml", "matplotlib")
NOT_AT_START = (*HEAVY, "numba", "pandas", "pandera", "scipy.stats", "scipy.optimize")


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_import_rules(file):
    found = imports(file)
    roots = {name.split(".")[0] for name in found}
    ours = {name.split(".")[1] for name in found if name.startswith("propensity_dagster.")}
    if place(file) not in ORCHESTRATION:
        assert "dagster" not in roots
        assert not ours & {"components", "defs", "definitions"} or file.name == "cli.py"
    for library, owner in ONLY_IN.items():
        assert library not in roots or place(file) == owner
    if place(file) in ("campaign.py", "campaign_sections.py", "errors.py"):
        assert ours <= {"errors", "campaign_sections"}
    if place(file) == "contracts":
        assert ours <= {"campaign", "campaign_sections", "errors", "contracts"}
    if place(file) == "evaluation":
        assert "models" not in ours
    top = {name.split(".")[0] for name in imports(file, top_level=True)}
    allowed = {"pyfunc_model.py": {"mlflow"}, "service.py": {"bentoml"}}.get(file.name, set())
    assert not (top & set(HEAVY)) - allowed, "heavy imports belong into the function that needs them"


@pytest.mark.parametrize("file", sorted(WORKER.glob("*.py")), ids=lambda f: f.name)
def test_the_worker_imports_what_the_bento_holds(file):
    found = imports(file)
    others = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"propensity_dagster"}
    assert others <= WORKER_PACKAGES
    for name in found:
        if name.startswith("propensity_dagster."):
            assert name.split(".")[1] in ("errors", "manifest", "serving", "wording")
            assert not name.startswith("propensity_dagster.serving.publish")


def test_every_module_says_what_belongs_there():
    silent = [
        str(f) for f in modules() if f != PACKAGE / "__init__.py" and not ast.get_docstring(ast.parse(f.read_text()))
    ]
    assert not silent


def test_the_code_location_imports_nothing_heavy():
    code = (
        "import sys; from propensity_dagster.definitions import defs; defs();"
        f"print([m for m in {NOT_AT_START!r} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().splitlines()[-1] == "[]"


def test_importing_the_core_never_imports_dagster():
    code = "import sys, propensity_dagster, propensity_dagster.runtime; print('dagster' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_no_pickle_in_the_core():
    for file in modules():
        assert not {"pickle", "joblib", "cloudpickle", "dill"} & {n.split(".")[0] for n in imports(file)}, file
