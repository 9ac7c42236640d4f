"""What benchmark scripts share: rows of a run that was killed, parts of one that was broken off, and versions."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
from benchmark_scripts import imported

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def common():
    with imported("common") as module:
        yield module


def test_half_a_row_at_the_end_is_left_out_and_does_not_spoil_the_next(common, tmp_path):
    file = tmp_path / "rows.jsonl"
    assert common.read_rows(file) == []
    for number in range(2):
        common.append_row(file, {"number": number})
    whole = file.read_text()
    assert common.read_rows(file, to_append=True) == [{"number": 0}, {"number": 1}] and file.read_text() == whole
    for torn in (whole + '{"numb', whole + '{"number": "\u00e9'[:12]):
        file.write_text(torn, encoding="utf-8")
        with pytest.warns(UserWarning, match=r"rows\.jsonl ends with half a row, of a run that was killed"):
            assert common.read_rows(file) == [{"number": 0}, {"number": 1}]
        assert file.read_text(encoding="utf-8") == torn  # a reader changes nothing: a run may be writing
    with pytest.warns(UserWarning, match="half a row"):
        common.read_rows(file, to_append=True)
    assert file.read_text() == whole
    file.write_text(whole.rstrip("\n"))  # killed between a row and the end of its line
    assert len(common.read_rows(file, to_append=True)) == 2 and file.read_text() == whole


def test_half_a_row_is_said_once(common, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"number": 0}\n{"nu')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            common.read_rows(file)
    assert len(said) == 1


def test_a_line_that_is_no_row_is_named(common, tmp_path):
    file = tmp_path / "rows.jsonl"
    for content in ('{"number": 0}\n{"nu\n{"number": 1}\n', '{"number": 0}\n{"nu\n'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"rows\.jsonl:2 is no JSON \(.*\): delete that line\.$"):
            common.read_rows(file)


def test_parts_of_a_call_that_was_broken_off_are_gone_on_with(common, tmp_path, capsys):
    file = tmp_path / "parts.json"

    def begin(made_with="torch 2", names=("a", "b"), **options):
        return common.Parts(file, names, made_with, **options)

    parts = begin()
    assert parts.left == ["a", "b"] and not file.exists()
    parts.add("a", [{"ms": 1.0}])
    assert json.loads(file.read_text()) == {"made_with": "torch 2", "left": ["b"], "a": [{"ms": 1.0}]}
    assert not list(tmp_path.glob("*.part")) and not capsys.readouterr().out
    again = begin()
    assert again.done == {"a": [{"ms": 1.0}]} and again.left == ["b"]
    assert (
        "parts.json is of a call that was broken off, and is gone on with (--fresh: not): a" in capsys.readouterr().out
    )
    assert begin("torch 3").done == {} and begin(fresh=True).done == {}
    again.add("b", [])
    assert json.loads(file.read_text())["left"] == []
    assert begin().done == {}  # that call came to its end: this one measures anew


def test_the_version_of_a_module_whose_distribution_has_another_name(common, tmp_path, monkeypatch):
    for name, source in (("triton_of_another_name", '__version__ = "3.9"'), ("triton_broken", "import nothing_at_all")):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert common.version_of("triton_of_another_name") == "3.9"
    assert common.version_of("triton_broken") == "that cannot be used (ModuleNotFoundError)"
    assert common.version_of("triton_nowhere") is None
    sys.modules.pop("triton_of_another_name")
