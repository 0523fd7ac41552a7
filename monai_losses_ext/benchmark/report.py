# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The tables of docs and README, generated from the committed JSON between marks, losing rows included; pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai_losses_ext.benchmark import conditions
from monai_losses_ext.benchmark.losing import losing_list
from monai_losses_ext.benchmark.losses import losses_table
from monai_losses_ext.benchmark.picture import save_speed
from monai_losses_ext.benchmark.purpose import purpose_tables, save_purposes
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.errors import UserError, fail

NOT_MEASURED = {"cpu": "Not measured yet.\n", "cuda": "Not measured: no GPU was at hand.\n"}
# What only a GPU tells: the suite, and what it measures.
GPU_SUITES = {
    "speed": "time of each loss beside MONAI's, MONAI's compiled and the floor; what a boundary term with a given map "
    "adds; peak memory; time of signed distance maps",
    "memory": "Dice + cross-entropy with 118 classes: peak memory, and a budget in which ours runs and MONAI's may not",
    "step": "the share of a training step that the loss takes, in mixed precision",
}


def write_report(root: Path) -> list[Path]:
    """Bring the tables and the pictures of a checkout up to date and return the files that hold them."""
    files = []
    for path, text in tables(root).items():
        path.write_text(text)
        files.append(path)
    for result in sorted((root / "docs" / "benchmarks").glob("speed--*.json")):
        files.append(result.with_suffix(".png"))
        save_speed(json.loads(result.read_text()), files[-1])
    for result in sorted((root / "docs" / "benchmarks").glob("purpose--*.json")):
        files.append(result.with_suffix(".png"))
        save_purposes(json.loads(result.read_text())["purpose"], files[-1])
    return files


def tables(root: Path) -> dict[Path, str]:
    """Return the files with tables, as the committed results say they should read.

    Args:
        root: a checkout of the project.

    Raises:
        UserError: where it is none.
    """
    results = root / "docs" / "benchmarks"
    if not results.is_dir():
        raise fail("report", "must be run in the folder of a checkout of the project", f"no {results} here")
    guide = root / "docs" / "training" / "loss_functions.md"
    performance, readme = root / "docs" / "training" / "performance.md", root / "README.md"
    text = performance.read_text()
    measured = {}
    for mark, table, name in (
        ("speed", _speed_table, "speed--cpu"),
        ("conditions", conditions_table, "conditions--cpu"),
        ("memory", _memory_table, "memory--cpu"),
        ("distance", _distance_table, "distance--cpu"),
        ("step-cpu", step_table, "step--cpu"),
        ("speed-cuda", cuda_table, "speed--cuda"),
        ("memory-cuda", budget_table, "memory--cuda"),
        ("step-cuda", step_table, "step--cuda"),
    ):
        path = results / f"{name}.json"
        if path.is_file():
            measured[name] = json.loads(path.read_text())
        missing = NOT_MEASURED[name.partition("--")[2]]
        text = _between_marks(text, mark, table(measured[name]) if name in measured else missing)
    text = _between_marks(text, "not-measured", _missing(results))
    quality = json.loads((results / "hippocampus.json").read_text())
    losses = json.loads((results / "hippocampus_losses.json").read_text())
    purpose = results / "purpose--cpu.json"
    shown = purpose_text(json.loads(purpose.read_text())) if purpose.is_file() else NOT_MEASURED["cpu"]
    compared = f"{_machine(losses['about'])}.\n\n{losses_table(losses['losses'])}"
    return {
        performance: _between_marks(text, "losing", losing_list(measured)),
        readme: _between_marks(readme.read_text(), "results", _quality_table(quality)),
        guide: _between_marks(_between_marks(guide.read_text(), "purpose", shown), "losses", compared),
    }


def _missing(results: Path) -> str:
    """Return which suites have not run on a GPU."""
    missing = [suite for suite in GPU_SUITES if not (results / f"{suite}--cuda.json").is_file()]
    lines = [f"- not measured: {GPU_SUITES[suite]} (`{suite} --device cuda`)" for suite in missing]
    return "\n".join(lines or ["All of it has been measured; the tables are above."]) + "\n"


def _between_marks(text: str, name: str, table: str) -> str:
    start, end = text.find(f"<!-- {name} -->\n"), text.find(f"<!-- /{name} -->")
    if not 0 <= start < end:
        raise UserError(f"docs: must hold the marks <!-- {name} --> and <!-- /{name} -->; got neither or one.")
    return f"{text[:start]}<!-- {name} -->\n{table}{text[end:]}"


def _quality_table(result: dict[str, Any]) -> str:
    lines = [
        f"On real data, Task04 of the Decathlon: {result['n_validation']} cases that training never saw, picked once "
        f"by seed; {result['minutes']:.0f} minutes of training on {result['hardware']}. Measured "
        f"{result['about']['date']}, commit {result['about']['commit']}.",
        "",
        "| | Dice | NSD at 1 mm | NSD at 1 mm, by voxels | HD95, mm |",
        "|---|---|---|---|---|",
    ]
    row = "| {name} | {dice:.3f} | {nsd:.3f} | {nsd_voxelwise:.3f} | {hd95:.2f} |"
    lines += [row.format(name=name, **values) for name, values in result["metrics"].items()]
    command = result["command"].replace("DIR/", "data/")  # where README's commands have put them
    lines += ["", f"```bash\n{command}\n```"]
    return "\n".join(lines) + "\n"


def _machine(about: dict[str, Any]) -> str:
    waiting = about.get("omp_wait_policy")
    policy = f" (OMP_WAIT_POLICY={waiting})" if waiting else ""
    scheduling = about.get("scheduling", "scheduling not recorded")
    return (
        f"{about['cpu']}, {about['threads']} threads{policy}, {scheduling}, torch {about['versions']['torch']}, "
        f"MONAI {about['versions']['monai']}, {about['date']}, commit {about['commit']}"
    )


def _gpu(about: dict[str, Any]) -> str:
    return (
        f"{about['device']}, CUDA {about.get('cuda')}, Triton {about.get('triton')}, "
        f"torch {about['versions']['torch']}, MONAI {about['versions']['monai']}, {about['date']}, "
        f"commit {about['commit']}"
    )


def cuda_table(result: dict[str, Any]) -> str:
    """Return what ``speed`` measured on a GPU as Markdown tables."""
    about = result["about"]
    lines = [
        f"{_gpu(about)}; float32, forward + backward, medians. Floor: the time of the bytes that must move, at the "
        f"{about['copy_gb_per_s']:.0f} GB/s with which memory is copied here.",
        "",
        "![Times of the table below](../benchmarks/speed--cuda.png)",
        "",
        "| shape | loss | side | ms (p20 to p80) | floor / ms | peak, copies of the logits |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["speed"]:
        for name, side in row["sides"].items():
            lines.append(f"| {row['shape']} | {row['loss']} | {name} | {_cuda_side(side, row['floor_ms'])} |")
    if "note" in about:
        lines.insert(1, f"\n{about['note']}")
    if not result["maps"]:
        return "\n".join(lines) + "\n"
    lines += ["", "| signed maps of the foreground | ours, ms | MONAI compute_distance_map, ms |", "|---|---|---|"]
    for row in result["maps"]:
        times = f"{row['ours']['median']:.2f} | {row['MONAI compute_distance_map']['median']:.0f}"
        lines.append(f"| {row['shape']} | {times} |")
    return "\n".join(lines) + "\n"


def budget_table(result: dict[str, Any]) -> str:
    """Return what ``memory`` measured on a GPU as a Markdown table."""
    lines = [
        f"{_gpu(result['about'])}; float32, forward + backward.",
        "",
        "| shape | loss | side | peak, copies of the logits | in a small memory, the logits included |",
        "|---|---|---|---|---|",
    ]
    for row in result["memory"]:
        for name, side in row["sides"].items():
            copies = "out of memory" if side["copies"] is None else f"{side['copies']:.2f}"
            outcome = f"{'runs' if side['fits'] else 'out of memory'} in {row['gib']:.2f} GiB"
            lines.append(f"| {row['shape']} | {row['loss']} | {name} | {copies} | {outcome} |")
    return "\n".join(lines) + "\n"


def conditions_table(result: dict[str, Any]) -> str:
    """Return what ``conditions`` measured as a Markdown table."""
    lines = [
        f"{_machine(result['about'])}; Dice + cross-entropy, float32, forward + backward.",
        "",
        "| where | shape | threads | side | median, ms | worst, ms | median / MONAI | worst / MONAI |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["conditions"]:
        theirs = row["sides"][conditions.BASELINE]
        for name, side in row["sides"].items():
            times = f"{side['median']:.1f} | {side['worst']:.1f}"
            ratios = f"{side['median'] / theirs['median']:.2f} | {side['worst'] / theirs['worst']:.2f}"
            where = conditions.WORDS[row["condition"]]
            lines.append(f"| {where} | {row['shape']} | {row['threads']} | {name} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def purpose_text(result: dict[str, Any]) -> str:
    """Return what ``purpose`` measured as Markdown tables, with the picture."""
    about, seeds = result["about"], sorted({part["seed"] for part in result["purpose"]})
    return (
        f"{_machine(about)}; seeds {', '.join(map(str, seeds))}. Mean over the seeds, and from the lowest to the "
        "highest. A row is better or worse where it is for every seed.\n\n"
        "![The first metric of each table below](../benchmarks/purpose--cpu.png)\n\n"
        f"{purpose_tables(result['purpose'])}"
    )


def step_table(result: dict[str, Any]) -> str:
    """Return what ``step`` measured as a Markdown table."""
    about = result["about"]
    is_cuda = about["device"] != "cpu"
    lines = [
        f"{_gpu(about) + '; mixed precision' if is_cuda else _machine(about) + '; float32'}, medians.",
        "",
        "| bundle | batch | loss | step, ms | the loss in it, ms | its share (p20 to p80) |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["step"]:
        name, batch = TASKS[row["task"]].bundle, "x".join(map(str, row["batch"]))
        for side, values in row["sides"].items():
            share = values["share"]
            spread = f"{share['median']:.1%} ({share['p20']:.1%} to {share['p80']:.1%})"
            times = f"{values['step_ms']['median']:.1f} | {values['loss_ms']['median']:.2f} | {spread}"
            lines.append(f"| {name} | {batch} | {row['loss']}, {side} | {times} |")
    return "\n".join(lines) + "\n"


def _cuda_side(side: dict[str, Any], floor_ms: float) -> str:
    if "error" in side:
        return f"{side['error']} | | "
    ms = side["ms"]["both"]
    copies = "" if side["copies"] is None else f"{side['copies']:.2f}"
    spread = f" ({ms['p20']:.2f} to {ms['p80']:.2f})" if "p20" in ms else ""
    return f"{ms['median']:.2f}{spread} | {floor_ms / ms['median']:.0%} | {copies}"


def _distance_table(result: dict[str, Any]) -> str:
    what = {
        "maps": "signed maps of the foreground by {backend}, {shape}",
        "term": "Dice + focal + boundary with a given map, {shape}",
        "three": "Dice + focal + boundary with a given map, {shape}",
        "learned": "the same with learned weights, {shape}",
        "epoch": "cached epoch of {cases} hippocampus cases, Dice + boundary, precomputed maps",
    }
    lines = [
        f"{_machine(result['about'])}; medians.",
        "",
        "| what | baseline | ours, ms | baseline, ms | ours / baseline (p20 to p80) |",
        "|---|---|---|---|---|",
    ]
    for row in result["distance"]:
        ours, theirs = row["ours_ms"]["median"], row["baseline_ms"]["median"]
        name = what[row["what"]].format(**row)
        lines.append(f"| {name} | {row['baseline']} | {ours:.0f} | {theirs:.0f} | {_spread(row['ratio'])} |")
    return "\n".join(lines) + "\n"


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _speed_table(result: dict[str, Any]) -> str:
    lines = [
        f"{_machine(result['about'])}; float32, forward + backward, medians.",
        "",
        "![Times of the table below](../benchmarks/speed--cpu.png)",
        "",
        "| shape | loss | baseline | ours, ms | baseline, ms | ours / baseline (p20 to p80) | compiled, ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_speed_row, result["speed"])]) + "\n"


def _speed_row(row: dict[str, Any]) -> str:
    ours, theirs = row["ours_ms"]["both"]["median"], row["baseline_ms"]["both"]["median"]
    times = f"{ours:.0f} | {theirs:.0f} | {_spread(row['ratio'])}"
    if "compiled_ms" in row:
        compiled = f"{row['compiled_ms']['both']['median']:.0f} | {row['compiled_ratio']['median']:.2f}"
    else:
        compiled = f"{'not compiled' if 'not_compiled' in row else ''} | "
    return f"| {row['shape']} | {row['loss']} | {row['baseline']} | {times} | {compiled} |"


def _memory_table(result: dict[str, Any]) -> str:
    lines = [
        "| shape | loss | ours, copies of the logits | without `fast` | baseline, copies |",
        "|---|---|---|---|---|",
    ]
    rows = result["memory"]
    row = "| {shape} | {loss} | {ours_copies:.2f} | {chunked_copies:.2f} | {baseline_copies:.2f} |"
    return "\n".join([*lines, *(row.format(**values) for values in rows)]) + "\n"
