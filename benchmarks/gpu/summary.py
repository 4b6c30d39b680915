"""What a run has shown: the lines that it prints last, and the files to send."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.kernels.command import describe_goal
from benchmarks.kernels.harness.case import Goal
from benchmarks.kernels.weight_only.providers.ours import CHOSEN

from . import goals
from .failures import skipped_ops
from .phases import PHASES, Phase
from .state import State, write_whole

__all__ = ["FILES", "LONGEST", "last_lines", "problems", "write_files"]

FILES = ("env.json", "smoke.json", "decode.json", "summary.json", "junit.xml", "log.txt")
# Some machines give back no more than the end of what was printed.
LONGEST = 9_500
# Names of tests that failed, and lines of a kind, before the rest is only counted.
MOST_NAMES, MOST_LINES = 30, 14
LOG_BYTES = 4 << 20
# Tiles that were tuned count as a win from here on.
WIN = 0.97


def problems(state: State) -> list[str]:
    """What is wrong, one line each: kernels, tests, rows that do not compute what they should, phases that failed."""
    found = [
        f"smoke: {row['key']}: {row['status']}: {row['error']}"
        for row in state.rows("smoke")
        if row["status"] in ("wrong", "error")
    ]
    found += [f"test: {row['key']}" for row in state.rows("tests") if row.get("outcome") == "failed"]
    if not state.outcome("tests").is_left:  # otherwise their turn comes again
        found += [f"test: {row['key']}: it began, and did not end"
                  for row in state.rows("tests") if row.get("outcome") == "begun"]  # fmt: skip
    found += [
        f"goals: {row['shape']} M={row['m']} {row['scheme']} {row['provider']}: {row['error']}"
        for row in kernel_results(state).get("rows", [])
        if row["status"] == "error" and row["kind"] != "provider" and row["provider"].startswith("sliderquant")
    ]
    found += [f"decode: {row['key']}: {row['error']}" for row in state.rows("decode") if "error" in row]
    found += [f"sanitizer: {row['hazards']} hazards" for row in state.rows("sanitizer") if row["hazards"]]
    for name, outcome in state.outcomes().items():
        if outcome.status == "failed":
            found.append(f"phase {name}, {outcome.attempts} times: {outcome.detail}")
    return found


def cautions(state: State) -> list[str]:
    """What right results do not say, one line each: goals, what was left out, checks that gave no answer."""
    found = []
    measured = [goal for goal in kernel_results(state).get("goals", []) if goal["measured"] is not None]
    missed = sum(not goal["passed"] for goal in measured)
    if missed:
        found.append(f"{missed} of {len(measured)} goals are missed")
    for op, widths in skipped_ops(state).items():
        found.append(f"goals left out {op}" + (f" of {', '.join(map(str, widths))} bits" if widths else "")
                     + ", which failed smoke")  # fmt: skip
    for row in state.rows("sanitizer"):
        if row["hazards"] is None and row["status"] != "rehearsed":
            found.append("the sanitizer gave no answer, see below")
    return found


def kernel_results(state: State) -> dict[str, Any]:
    """The file of `benchmarks kernels`; empty if there is none yet."""
    files = sorted((state.folder / goals.FOLDER).glob("*/kernels-*.json"))
    return json.loads(files[0].read_text(encoding="utf-8")) if files else {}


def last_lines(state: State, phases: Sequence[Phase], out: Path, resume: str) -> str:
    """What is wrong first, then the figures, then what is left to do and how; at most `LONGEST` characters."""
    wrong = problems(state)
    lines = ["", *_machine(state), ""]
    lines += [f"{'WRONG' if wrong else 'nothing is wrong'}{f': {len(wrong)}' if wrong else ''}"]
    lines += [f"  {line.splitlines()[0][:240]}" for line in wrong[:MOST_NAMES]]
    lines += [f"  ... and {len(wrong) - MOST_NAMES} more in summary.json"] if len(wrong) > MOST_NAMES else []
    for name, outcome in state.outcomes().items():
        if outcome.status == "failed":
            lines += [f"  {name}: {line[:160]}" for line in outcome.detail.splitlines()[1:][-6:]]
    lines += [f"but: {line}" for line in cautions(state)]
    lines += [*_smoke(state), *_roofs(state), *_tests(state), *_goals(state), *_tuned(state), *_decode(state)]
    lines += [f"sanitizer: {row['status'].strip()[-200:]}" for row in state.rows("sanitizer")]
    skipped = {phase.name: state.outcome(phase.name).detail for phase in phases
               if state.outcome(phase.name).status == "skipped"}  # fmt: skip
    lines += [f"skipped: {name}: {reason}" for name, reason in skipped.items()]
    left = [phase.name for phase in phases if state.outcome(phase.name).is_left and phase.name not in skipped]
    lines += [f"files: {out}"]
    through = "all phases are" if len(phases) == len(PHASES) else f"{', '.join(phase.name for phase in phases)}:"
    lines += [f"left: {', '.join(left)}. To go on:\n  {resume}"] if left else [f"{through} through"]
    text = "\n".join(lines)
    if len(text) > LONGEST:
        end = "\n".join(lines[-3:])
        text = text[: LONGEST - len(end) - 40] + "\n... (the rest is in the files)\n" + end
    return text


def _machine(state: State) -> list[str]:
    row = next((row for row in state.rows("env") if row["key"] == "machine"), None)
    if row is None:
        return ["the device gave no answer"]
    clocks = row["clocks"] or {}
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("torch", "triton", "transformers"))
    cache = next((row["text"] for row in state.rows("env") if row["key"] == "cache"), "")
    found = " ".join(f"{name} {value}" for name, value in clocks.items() if name.startswith(("clocks", "driver")))
    return [
        f"=== {row.get('gpu', row['cpu'] + ' (a rehearsal: no figure here measures a kernel)')}, python "
        f"{row['python']}, {versions}, sources {row['sources']}",
        *([f"    {found}"] if found else []),
        f"    kernels: {cache}",
    ]


def _smoke(state: State) -> list[str]:
    rows = state.rows("smoke")
    good, not_here = (sum(row["status"] == word for row in rows) for word in ("ok", "unsupported"))
    return [f"smoke: {good} of {len(rows) - not_here} right, {not_here} need a GPU"] if rows else []


def _roofs(state: State) -> list[str]:
    found = {row["key"]: row for row in state.rows("roofline")}
    parts = []
    if "floors" in found:
        floors = found["floors"]
        parts += [
            f"copy {floors['copy_gbps']:.0f}, read {floors['read_gbps']:.0f} GB/s",
            f"bf16 {floors['matmul_tflops']:.3g} TFLOP/s, empty kernel {floors['empty_kernel_us']:.2f} us",
        ]
    if "L2" in found:
        parts.append(f"L2 {found['L2']['gbps']:.0f} GB/s")
    if "int8" in found:
        parts.append(f"int8 {found['int8']['tops']:.3g} TOP/s")
    lines = [f"roofs: {', '.join(parts)}"] if parts else []
    if "host" in found:
        direct = {name: us for name, us in found["host"]["us"].items() if "dispatcher" not in name}
        lines.append("host, us a call: " + ", ".join(f"{name.partition(',')[0]} {us}" for name, us in direct.items()))
    return lines


def _tests(state: State) -> list[str]:
    rows = [row for row in state.rows("tests") if "outcome" in row]
    if not rows:
        return []
    count = {word: sum(row["outcome"] == word for row in rows) for word in ("passed", "failed", "skipped", "begun")}
    return ["tests: " + ", ".join(f"{number} {word}" for word, number in count.items() if number or word != "begun")]


def _goals(state: State) -> list[str]:
    content = kernel_results(state)
    rows = content.get("rows", [])
    wanted = content.get("goals", [])
    lines = [describe_goal(_as_goal(goal)) for goal in wanted if goal["measured"] is not None]
    more = [f"... and {len(lines) - MOST_LINES} more in the file"] if len(lines) > MOST_LINES else []
    unmeasured = len(wanted) - len(lines)
    more += [f"goals with nothing measured yet: {unmeasured}"] if unmeasured else []
    lines = lines[:MOST_LINES] + more
    foreseen = {(row["shape"], row["scheme"], row["m"]): row["us"] for row in state.rows("env") if "us" in row}
    ratios = [
        row["q50_us"] / foreseen[key]
        for row in rows
        if row["kind"] == "time" and row["status"] == "ok" and row["provider"] == CHOSEN
        and (key := (row["shape"], row["scheme"], row["m"])) in foreseen
    ]  # fmt: skip
    if ratios:
        near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
        lines.append(f"estimates: {near} of {len(ratios)} within 10%; took / foreseen from {min(ratios):.2f} to "
                     f"{max(ratios):.2f}")  # fmt: skip
    return ["goals:", *(f"  {line}" for line in lines)] if lines else []


def _as_goal(fields: dict[str, Any]) -> Goal:
    return Goal(**{name: fields[name] for name in Goal._fields})


def _tuned(state: State) -> list[str]:
    rows = [row for row in state.rows("tune") if "ratio" in row]
    if not rows:
        return []
    again = {row["key"]: row["ratio"] for row in state.rows("retime")}
    wins = sorted((row for row in rows if row["ratio"] <= WIN), key=lambda row: row["ratio"])
    lines = [f"tune: {len(wins)} of {len(rows)} problems gain more than 3% over the rules"]
    for row in wins[:MOST_LINES]:
        once_more = f", once more {again[row['key']]:.2f}" if row["key"] in again else ""
        lines.append(f"  {row['key']}: {row['ratio']:.2f}{once_more}: {row['best']}")
    return lines


def _decode(state: State) -> list[str]:
    rows = state.rows("decode")
    warm = [row for row in rows if row.get("warm")] or [row for row in rows if "turn" in row]
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in warm):
        found = [row["ms"] for row in warm if row["batch"] == batch]
        medians = {way: statistics.median(ms[way] for ms in found) for way in found[0]}
        lines.append(
            f"decode, batch {batch}, ms a token: " + ", ".join(f"{way} {ms:.3f}" for way, ms in medians.items())
        )
    alone = [f"{row['key']} {row['ms']:.3f}" for row in rows if " graph of " in row["key"] and "ms" in row]
    return lines + ([f"decode, the graph alone, ms: {', '.join(alone)}"] if alone else [])


def write_files(state: State, out: Path) -> None:
    """Write the result files, at most 8, from what there is; each is replaced as a whole."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "env": {"env": state.rows("env"), "roofline": state.rows("roofline")},
        "smoke": state.rows("smoke"),
        "decode": state.rows("decode"),
        "summary": {
            "device": state.device,
            "problems": problems(state),
            "cautions": cautions(state),
            "outcomes": {name: vars(outcome) for name, outcome in state.outcomes().items()},
            "tune": state.rows("tune"),
            "retime": state.rows("retime"),
            "sanitizer": state.rows("sanitizer"),
        },
    }
    for name, content in contents.items():
        if content:
            write_whole(out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    if rows := [row for row in state.rows("tests") if "outcome" in row]:
        write_whole(out / "junit.xml", junit(rows))
    for path in [*(state.folder / goals.FOLDER).glob("*/kernels-*.json"), *(state.folder / "tune").glob("*.json")]:
        name = f"tuned-{path.name.removeprefix('tuned-')}" if path.parent.name == "tune" else path.name
        write_whole(out / name, path.read_text(encoding="utf-8"))
    if state.log.is_file():
        with state.log.open("rb") as file:
            file.seek(max(0, state.log.stat().st_size - LOG_BYTES))
            write_whole(out / "log.txt", file.read().decode("utf-8", errors="replace"))


def junit(rows: Sequence[dict[str, Any]]) -> str:
    """The tests as JUnit's XML. pytest writes it at its end alone, and several attempts are one run here."""
    suite = ElementTree.Element("testsuite", name="gpu", tests=str(len(rows)))
    for word, attribute in (("failed", "failures"), ("skipped", "skipped"), ("begun", "errors")):
        suite.set(attribute, str(sum(row["outcome"] == word for row in rows)))
    for row in rows:
        file, _, name = row["key"].partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(file), name=_xml(name), time=str(row["seconds"])
        )
        if row["outcome"] != "passed":
            tag = {"failed": "failure", "skipped": "skipped", "begun": "error"}[row["outcome"]]
            ElementTree.SubElement(case, tag).text = _xml(row.get("text", ""))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Text without what XML has no characters for, such as the colours of a terminal."""
    return re.sub("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
