"""The result of `gpu_check.py` for people: one section of Markdown, to paste into docs/gpu.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node_time import PHASES, Spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DRY_RUN = (
    "**Dry run on the CPU.** No GPU took part: this shows that the script works, and nothing about any GPU."
)


def section(result: Mapping[str, Any]) -> str:
    """The whole section."""
    gpus = ", ".join(
        f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in result["gpus"]
    )
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"### {'Dry run' if result['dry_run'] else gpus}, {result['date']}", ""]
    if result["dry_run"]:
        lines += [DRY_RUN, ""]
    lines += [
        f"`{result['command']}`; {result['cpu']}; driver {result['driver'] or 'none'}; {versions}.",
        f"Verdict: **{verdict(result)}**",
        "",
        *(f"- {line}" for line in failures(result)),
        "",
        *_table(("engine", "precision", "parity", "refit", "greedy tokens as eager"), _verdict_rows(result)),
        "",
        "Latency, steered / unsteered, copies between host and device included; medians and [quartiles] of the "
        "ratios within a round, and of two engines that are both unsteered:",
        "",
        *_table(
            ("engine", "decoder", "phase", "unsteered, ms", "steered, ms", "**ratio**", "noise"),
            _latency_rows(result),
        ),
        "",
        "Tokens per second, decoder and token embedding, greedy, against the eager model steered by hooks on the "
        "same device:",
        "",
        *_table(
            ("engine", "precision", "batch", "tokens a row", "engine", "eager", "**engine / eager**"),
            _rate_rows(result),
        ),
        "",
        f"Tests marked `gpu`: {result['tests']['summary']}.",
    ]
    for check in result["checks"]:
        if "table" in check:
            lines += [
                "",
                f"Parity of {check['engine']}, {check['precision']}:",
                "",
                "```",
                check["table"],
                "```",
            ]
    return "\n".join(lines) + "\n"


def verdict(result: Mapping[str, Any]) -> str:
    """`passed` when nothing failed."""
    return "failed" if failures(result) else "passed"


def failures(result: Mapping[str, Any]) -> list[str]:
    """What failed, a line each; precisions that this release cannot prove are no failures."""
    found = []
    for check in result["checks"]:
        name = f"{check['engine']}, {check['precision']}"
        if check["verdict"] not in ("passed", "unsupported"):
            found.append(f"{name}: parity: {check['verdict']}{_because(check)}")
        for part, measured in check.get("measured", {}).items():
            if "error" in measured:
                found.append(f"{name}: {part}: {measured['error']}")
        refit = check.get("measured", {}).get("refit", {})
        if "error" not in refit and not refit.get("passed", True):
            found.append(f"{name}: refit: {refit_text(refit)}")
    if not any(check["verdict"] == "passed" for check in result["checks"]):
        found.append("no engine was proven")
    for engine, measured in result["random_decoder"].items():
        if "error" in measured:
            found.append(f"{engine}: latency of the random decoder: {measured['error']}")
    if not result["tests"]["passed"]:
        found.append(f"tests marked gpu: {result['tests']['summary']}")
    return found


def refit_text(refit: Mapping[str, Any]) -> str:
    """What came of a refit, in one cell."""
    if "error" in refit:
        return "error"
    found = "passed" if refit["passed"] else "FAILED"
    return (
        f"{found}: {refit['difference']:.2g} from one built anew (limit {refit['limit']:g}; the old plan differs by "
        f"{refit['told_apart']:.2g}); {refit['seconds']:.2f} s, a build {refit['rebuild_seconds']:.2f} s"
    )


def _because(check: Mapping[str, Any]) -> str:
    return f" ({check['reason']})" if check.get("reason") else ""


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    body = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in body]


def _verdict_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for check in result["checks"]:
        measured = check.get("measured", {})
        refit = refit_text(measured["refit"]) if "refit" in measured else "-"
        rates = measured.get("throughput", {"error": ""})
        same = "-" if "error" in rates else ", ".join(f"{row['same_tokens']:.1%}" for row in rates["rows"])
        yield check["engine"], check["precision"], check["verdict"] + _because(check), refit, same


def _latency_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    measured = [
        (check["engine"], f"pocket LALM, {check['precision']}", check["measured"]["latency"])
        for check in result["checks"]
        if "latency" in check.get("measured", {})
    ]
    measured += [(engine, result["random_name"], found) for engine, found in result["random_decoder"].items()]
    for engine, decoder, found in measured:
        if "error" in found:
            continue
        for phase in PHASES:
            spreads = {name: Spread(**values) for name, values in found[phase].items()}
            where = f"{phase} {'of' if phase == 'prefill' else 'behind'} {found['positions']}"
            yield (
                engine,
                decoder,
                where,
                spreads["unsteered_ms"].text(3),
                spreads["steered_ms"].text(3),
                spreads["ratio"].text(4),
                spreads["noise_ratio"].text(4),
            )


def _rate_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for check in result["checks"]:
        rates = check.get("measured", {}).get("throughput", {"error": ""})
        for row in rates.get("rows", ()):
            yield (
                check["engine"],
                check["precision"],
                str(row["batch"]),
                str(row["tokens"]),
                Spread(**row["engine"]).text(1),
                Spread(**row["eager"]).text(1),
                Spread(**row["ratio"]).text(3),
            )
