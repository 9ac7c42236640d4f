"""What GitHub and ComfyUI's registry are given: workflows that run, tags that are versions, a whole pack."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pathspec import PathSpec

import vidaccel

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]


def steps(workflow: str, job: str) -> list[dict]:
    return WORKFLOWS[workflow]["jobs"][job].get("steps", [])


def test_the_workflows_are_there():
    assert WORKFLOWS.keys() == {"ci", "docs", "release"}
    assert WORKFLOWS["ci"]["jobs"].keys() == {"lint", "tests", "versions", "docs", "package", "comfyui"}


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_a_job_runs_what_there_is(workflow, job):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in steps(workflow, job):
        assert ("run" in step) != ("uses" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"]), step
            continue
        done = subprocess.run(["bash", "-n"], input=step["run"], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        for line in step["run"].replace("\\\n", " ").splitlines():
            words = line.split()
            if words[0] == "make":
                targets = [word for word in words[1:] if "=" not in word]
                assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), line
                variables = [word.partition("=")[0] for word in words if "=" in word]
                assert all(re.search(rf"\b{name}\b", makefile) for name in variables), line
            for script in re.findall(r"\S+\.py\b", line):
                assert (ROOT / script.replace('"', "")).is_file() or "$" in script, line


@pytest.mark.parametrize(("workflow", "job"), JOBS)
def test_a_job_is_bounded_and_may_do_little(workflow, job):
    found = WORKFLOWS[workflow]["jobs"][job]
    assert WORKFLOWS[workflow]["permissions"] == {"contents": "read"}
    assert set(found.get("permissions", {})) <= {"pages", "id-token"}
    if "uses" in found:
        assert (ROOT / found["uses"]).is_file()
    else:
        assert found["timeout-minutes"] <= 60
    needed = found.get("needs", [])
    assert set([needed] if isinstance(needed, str) else needed) <= WORKFLOWS[workflow]["jobs"].keys()


def test_every_python_that_is_promised_is_tested(project):
    promised = [c.rpartition(" ")[2] for c in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert WORKFLOWS["ci"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == promised


def test_comfyui_is_a_version_that_the_pack_takes(project):
    tag = WORKFLOWS["ci"]["jobs"]["comfyui"]["env"]["COMFYUI_TAG"]
    least = project["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert re.fullmatch(r"v\d+\.\d+\.\d+", tag)
    assert [int(n) for n in tag[1:].split(".")] >= [int(n) for n in least.split(".")]


def test_comfyui_runs_the_tests_of_its_own_models():
    """They need ComfyUI in their process: with the project's Python all of them are skipped."""
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-comfyui:")[2].partition("\n\n")[0]
    (pattern,) = re.findall(r'grep -lE "(.*?)"', recipe)
    files = [file.name for file in (ROOT / "tests" / "nodes").glob("test_*.py")
             if re.search(pattern, file.read_text(), re.MULTILINE)]  # fmt: skip
    assert {"test_native_comfyui.py", "test_native_comfyui_nodes.py", "test_native_length.py"} <= set(files)
    assert "$(COMFYUI_PYTHON) -m pytest" in recipe
    installed = " ".join(step.get("run", "") for step in steps("ci", "comfyui")).split()
    assert "pytest" in installed and "torchmetrics" in installed  # what the node Tune needs besides


@pytest.fixture(scope="module")
def problem():
    return runpy.run_path(str(ROOT / ".github" / "check_tag.py"))["problem"]


SOURCE, RELEASED = '__version__ = "1.2.3"\n', "## [1.2.3] - 2026-11-28\n"


@pytest.mark.parametrize(
    ("tag", "source", "changelog", "said"),
    [
        ("v1.2.3", SOURCE, RELEASED, None),
        ("1.2.3", SOURCE, RELEASED, "the tag of that is v1.2.3"),
        ("v1.2.4", SOURCE, RELEASED, "the tag is v1.2.4, and __version__ in __init__.py is 1.2.3"),
        ("v1.2.3", SOURCE, "## [1.2.2] - 2026-01-01\n", r"no section ## \[1.2.3\]"),
        ("v1.2.3", SOURCE, "## [1.2.3] - not released yet\n", "no date of release"),
        ("v1.2.3", "", RELEASED, "no line __version__"),
    ],
)
def test_a_tag_is_the_version(problem, tag, source, changelog, said):
    found = problem(tag, source, changelog)
    assert found is None if said is None else re.search(said, found)


def test_the_check_ends_with_an_error():
    script = [sys.executable, str(ROOT / ".github" / "check_tag.py")]
    done = subprocess.run([*script, "v0.0.0"], capture_output=True, text=True)
    assert done.returncode == 1 and f"is {vidaccel.__version__}" in done.stderr


def test_the_page_on_pypi_has_whole_addresses(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    monkeypatch.setitem(sys.modules, "links", None)  # so that it is gone again behind the test
    del sys.modules["links"]
    released = runpy.run_path(str(ROOT / ".github" / "release_readme.py"))["released"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    made = released(page, "https://example.org/o/n/", "v1.2.3")
    found = re.findall(r"\]\(([^()\s]+)\)", made)
    assert len(found) == len(re.findall(r"\]\(([^()\s]+)\)", page)) > 20
    for target in found:
        assert target.startswith("https://"), target
        kind, path = re.fullmatch(r"https://example\.org/o/n/(blob|raw)/v1\.2\.3/([^#]+)(?:#.+)?", target).groups()
        assert (ROOT / path).exists() and (kind == "raw") is path.endswith(".png"), target
    (build,) = [step["run"] for step in steps("release", "build") if "release_readme" in step.get("run", "")]
    assert build.split()[2:] == ['"$GITHUB_SERVER_URL/$GITHUB_REPOSITORY"', '"$GITHUB_REF_NAME"']


def test_the_forms_for_issues_can_be_read():
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert forms
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"] and content["description"]
        ids = [part["id"] for part in content["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) and all(part["attributes"] for part in content["body"])


def test_the_registry_knows_all_but_the_address(project):
    """https://docs.comfy.org/registry/specifications names them."""
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= comfy.keys()
    assert (ROOT / comfy["Icon"]).is_file() and project["project"]["description"] and project["project"]["license"]


def test_the_pack_of_the_registry_is_whole(package_folders, project):
    """What nodes need is not left out; tests and benchmarks are."""
    ignored = PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text().splitlines())
    needed = [ROOT / name for name in ("__init__.py", "README.md", "LICENSE", "pyproject.toml", "docs/icon.png")]
    needed += [*ROOT.glob("requirements*.txt"), *(ROOT / "example_workflows").rglob("*.json")]
    for name, folder in package_folders.items():
        for pattern in ("*.py", *project["tool"]["setuptools"]["package-data"].get(name, [])):
            needed += [file for file in folder.glob(pattern) if file.is_file()]
    names = [file.relative_to(ROOT).as_posix() for file in needed]
    assert [name for name in names if ignored.match_file(name)] == []
    for name in ("tests/conftest.py", "benchmarks/quality.py", "docs/index.md", ".github/workflows/ci.yml"):
        assert (ROOT / name).is_file() and ignored.match_file(name)
