"""How many cases of a slow test function `make check` and `make test` run; `make exhaustive` runs all.

    pytest --junitxml times.xml                         every case, timed
    python tests/case_budget.py times.xml               writes tests/case_budget.txt

A line is "CHECK TEST FUNCTION": the cases that each of the two runs; a function that is not listed runs whole in both.
`make test` runs as many cases of a function as take some seconds, at least one, chosen by a hash of its name: those
that it omits are further parameters. Functions of which one case takes long run in `make exhaustive` alone, but for
those that go through a whole product from end to end (ENDS). `make check` has no function whose cases take long.
"""

from __future__ import annotations

import hashlib
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

LISTED = Path(__file__).with_suffix(".txt")
RUNS = ("check", "test")
SLOW = 0.4
"""Seconds of a case, on average, from which `make check` omits a function."""
SECONDS = 2
"""Of one function in `make test`, and at least one case."""
LONG = 10
"""Seconds of a case, on average, from which `make test` omits a function, if it is none of ENDS."""
ENDS = {
    "tests/api/test_compile_for_generate.py::test_the_tokens_are_the_models_own",
    "tests/api/test_load_package.py::test_another_process_opens_it_without_compiling",
    "tests/api/test_quantize_folder.py::test_a_process_that_was_killed_goes_on",
    "tests/api/test_quantize_folder.py::test_ranks_write_what_one_process_writes",
    "tests/backend/test_dynamo.py::test_quantized_module_compiles_to_the_same",
    "tests/codegen/cpu/test_native_kernels.py::test_every_instruction_set_gives_the_same_bits",
    "tests/codegen/cpu/test_short_attention.py::test_every_instruction_set",
    "tests/codegen/onnx/fusions/attention/test_int8_kv_cache.py::test_an_int8_cache_runs_in_onnxruntime_genai",
    "tests/codegen/onnx/fusions/test_last_token_logits.py::test_the_last_logits_are_enough_to_generate",
    "tests/codegen/onnx/test_sentence_embedding.py::test_a_real_encoder_from_the_command_line",
    "tests/evaluation/test_compare.py::test_rows_and_resumption",
    "tests/modules/test_quant_experts.py::test_it_compiles",
    "tests/passes/test_zoo.py::test_saves_loads_compiles_and_exports",
    "tests/test_doc_snippets.py::test_pages_run",
    "tests/test_examples.py::test_it_runs",
    "tests/test_real_model.py::test_eager_compiled_and_onnx_choose_the_same_tokens",
    "tests/test_real_model.py::test_perplexity",
    "tests/training/test_fixed_point_training.py::test_two_processes_have_one_model",
    "tests/training/test_q_galore_training.py::test_two_ranks_are_one_process",
}
"""Functions that take long and that `make test` runs one case of."""


def function_of(nodeid: str) -> str:
    """A test's file and name, without the parameters of a case."""
    return nodeid.partition("[")[0]


def kept(run: str) -> dict[str, int]:
    """Function -> how many cases a run keeps, of those that are listed."""
    column = RUNS.index(run)
    lines = [line.split(maxsplit=2) for line in LISTED.read_text().splitlines()]
    return {line[2]: int(line[column]) for line in lines}


def chosen(nodeids: Iterable[str], limits: dict[str, int]) -> set[str]:
    """The cases that are kept: of a listed function those whose names have the smallest hashes."""
    cases: dict[str, list[str]] = defaultdict(list)
    for nodeid in nodeids:
        cases[function_of(nodeid)].append(nodeid)
    found: set[str] = set()
    for function, own in cases.items():
        found.update(sorted(own, key=_hash)[: limits.get(function, len(own))])
    return found


def _hash(nodeid: str) -> str:
    return hashlib.sha256(nodeid.encode()).hexdigest()


def timed(report: Path) -> dict[str, list[float]]:
    """Function -> seconds of its cases, of a timed run."""
    times: dict[str, list[float]] = defaultdict(list)
    for case in ET.parse(report).iter("testcase"):
        parts = case.attrib["classname"].split(".")
        owner = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
        file = "/".join(parts[: owner + 1]) + ".py"
        name = "::".join([file, *parts[owner + 1 :], case.attrib["name"]])
        times[function_of(name)].append(float(case.attrib["time"]))
    return times


def budget(times: dict[str, list[float]], seconds: float = SECONDS) -> dict[str, int]:
    """Function -> how many cases `make test` keeps."""
    return {
        name: 0 if _mean(own) >= LONG and name not in ENDS else max(1, min(len(own), int(seconds / _mean(own))))
        for name, own in times.items()
    }


def _mean(seconds: list[float]) -> float:
    return max(sum(seconds) / len(seconds), 1e-4)


def lines(times: dict[str, list[float]], before: Iterable[str] = ()) -> list[str]:
    """The lines of the list: functions of which one of the runs omits something.

    Args:
        times: of all cases, or of those that `make test` runs.
        before: the lines by which the timed run omitted cases. These functions stay listed.
    """
    old = {line.split(maxsplit=2)[2]: line for line in before}
    found = {name: line for name, line in old.items() if name not in times}
    whole = budget(times)
    for name, own in times.items():
        check = 0 if _mean(own) >= SLOW else len(own)
        if check < len(own) or whole[name] < len(own) or name in old:
            found[name] = f"{min(check, whole[name])} {whole[name]} {name}"
    return [found[name] for name in sorted(found)]


if __name__ == "__main__":
    written = lines(timed(Path(sys.argv[1])), LISTED.read_text().splitlines())
    LISTED.write_text("".join(f"{line}\n" for line in written))
