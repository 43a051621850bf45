"""What report.tex reads.

In come results; out come LaTeX macros: every value of comparison.json by its path, tables, and
lists to loop over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lab.measure.stress import Outcome
from lab.report import records, sentences, tables
from lab.report.results import Results, named_images


def latex_values(results: Results) -> str:
    r"""Macros for report.tex.

    \val{images/test} there is that value of comparison.json. The others are tables, lists of keys
    and numbers to loop over, and lists to print.
    """
    lines = []
    for path, value in flatten(records.comparison_record(results)):
        lines.append(rf"\expandafter\def\csname val:{path}\endcsname{{{tables.latex_text(value)}}}")
    networks = [of_network.network for of_network in results.networks]
    keys = [network.key for network in networks]
    stages = range(results.setup.stages)
    names = [name for name, _ in named_images(results) if name.endswith("_1")]
    macros = {
        "question": tables.latex_text(sentences.ask(networks[1:])),
        "describedkeys": ",".join(one.key for one in networks if one.description),
        "citedkeys": ",".join(one.key for one in networks if one.citation),
        "firstkey": keys[0],
        "networkcount": str(len(keys)),
        "networkkeys": ",".join(keys),
        "comparedkeys": ",".join(keys[1:]),
        "firsttwokeys": ",".join(keys[:2]),  # for whose curves and confusions there is room
        "gatedkeys": ",".join(keys_with_gates(results.stress)),
        "stageindices": ",".join(str(k) for k in stages),
        "stagenumbers": ",".join(str(k + 1) for k in stages),
        "stagecount": str(len(stages)),
        "gradcamnames": ",".join(names[:2]),
    }
    for name, table in tables.all_tables(results):
        macros[f"{name.replace('_', '')}table"] = tables.in_latex(table)
    if results.failures is not None and results.failures.people is not None:
        of_people = tables.narrow_people_table(results, results.failures.people)
        macros["narrowpeopletable"] = tables.in_latex(of_people)
    macros["parameterstable"] = tables.in_latex(tables.parameters_table(results))
    if results.stress is not None:
        wrapped = r">{\raggedright\arraybackslash}p{21em}"  # so that the type need not be smaller
        main_table = tables.main_stress_table(results.stress)
        macros["mainstresstable"] = tables.in_latex(main_table, wrapped)
        macros["narrowstresstable"] = tables.in_latex(tables.narrow_stress_table(results.stress))
    return "\n".join(lines) + "\n" + in_macros(macros)


def in_macros(contents: Mapping[str, str]) -> str:
    """LaTeX's definitions of macros, by their names."""
    lines = [rf"\newcommand{{\{name}}}{{{content}}}" for name, content in contents.items()]
    return "\n".join(lines) + "\n"


def keys_with_gates(stress: Outcome | None) -> list[str]:
    """The networks whose gates were studied, and which have some after every stage."""
    if stress is None:
        return []
    keys = []
    for one in stress.networks:
        stages = len(one.heatmaps.likeness_without_stage)
        if one.gates is not None and len(one.gates.mean_by_class) == stages:
            keys.append(one.network.key)
    return keys


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, each with its path: ("images/test", 10000)."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        branches = list(value.items())
    elif isinstance(value, list | tuple):
        branches = list(enumerate(value))
    else:
        yield path, value
        return
    for name, inner in branches:
        yield from flatten(inner, f"{path}/{name}" if path else str(name))
