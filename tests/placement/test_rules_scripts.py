"""The scripts that run published rules: what they refuse, each in one line."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"
UNIT = "req_id,unit_arrival_s,input_len,output_len"
TRACE = "request_id,arrival_timestamp,prompt_size,token_size"
ROWS = ("0,0,512,4", "1,1.5,100,2")


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit status of a script, and what it says on standard error."""

    def run(name: str, *options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        return script(name).main(), capsys.readouterr().err

    return run


def written(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "load.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


DISTSERVE = ("--prefill", "1x1", "--decode", "1x1", "--workload")
SPLITWISE = ("--baseline", "1", "--trace")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (("0,0,512,4", "1,-1,5,5"), "row 3, arrival_s"),
        (("0,2,512,4", "1,1,5,5"), "row 3, arrival_s"),
        (("0,0,many,4",), "row 2, prompt_tokens"),
        (("0,0,5.5,4",), "row 2, prompt_tokens"),
        (("0,0,512",), "row 2, output_tokens"),
        (("0,0,512,0",), "row 2, output_tokens"),
        ((), "holds no requests"),
    ],
)
@pytest.mark.parametrize(
    "asked",
    [
        ("distserve_rules", UNIT, ("--rate", "1", *DISTSERVE)),
        ("splitwise_rules", TRACE, SPLITWISE),
    ],
)
def test_a_bad_row_is_named(answer, tmp_path, asked, rows, says) -> None:
    name, header, options = asked
    path = written(tmp_path, header, *rows)
    status, said = answer(name, *options, path)
    assert status == 2
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--goodput", "2"),
        ("--goodput", "0"),
        ("--goodput", "0.9", "--resolution", "0"),
        ("--goodput", "0.9", "--search-high", "inf"),
        ("--rate", "nan"),
        ("--rate", "1", "--ttft", "-1"),
    ],
)
def test_a_search_that_could_not_end_well_is_refused(answer, tmp_path, options) -> None:
    path = written(tmp_path, UNIT, *ROWS)
    status, said = answer("distserve_rules", *DISTSERVE, path, *options)
    assert status == 2
    assert said.startswith(options[-2].removeprefix("--"))


def test_other_columns_and_absent_references_are_refused(answer, tmp_path) -> None:
    path = written(tmp_path, TRACE, *ROWS)
    status, said = answer("distserve_rules", *DISTSERVE, path, "--rate", "1")
    assert (status, "lacks unit_arrival_s" in said) == (2, True)
    for name in ("distserve_rules", "splitwise_rules"):
        status, said = answer(name, "--all", "--reference", str(tmp_path))
        assert (status, "no such file" in said) == (2, True)


def test_a_trace_that_ends_before_its_first_request_is_refused(answer, tmp_path) -> None:
    path = written(tmp_path, TRACE, *ROWS)
    status, said = answer("splitwise_rules", *SPLITWISE, path, "--until", "0")
    assert (status, "until" in said) == (2, True)


def test_good_files_are_read_as_they_stand(tmp_path) -> None:
    found = script("distserve_rules").read_workload(Path(written(tmp_path, UNIT, *ROWS)))
    np.testing.assert_array_equal(found.arrival_s, [0.0, 1.5])
    trace = script("splitwise_rules").read_trace(Path(written(tmp_path, TRACE, *ROWS)), 1.0)
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist()) == ([0.0], [512])
